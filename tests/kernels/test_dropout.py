"""Dropout on a CPU: its rate, its scale, its repetition."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from wikift.kernels.dropout import draw_own_masks, drop


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_it_keeps_its_rate_and_its_mean(rate: float) -> None:
    torch.manual_seed(5)
    found = drop(torch.ones(64, 1001), rate)
    dropped = float((found == 0).double().mean())
    assert abs(dropped - rate) < 5 * (rate * (1 - rate) / found.numel()) ** 0.5
    kept = round(2**16 * (1 - rate)) / 2**16
    assert found.unique().tolist() == pytest.approx([0.0, 1 / kept], rel=1e-6)
    # rows and columns alike: no stripes
    assert (found == 0).double().mean(0).std() < 1.3 * (rate * (1 - rate) / 64) ** 0.5
    assert (found == 0).double().mean(1).std() < 1.3 * (rate * (1 - rate) / 1001) ** 0.5


def test_the_seed_repeats_it_and_every_draw_is_another() -> None:
    ones = torch.ones(1000)
    torch.manual_seed(5)
    first, second = drop(ones, 0.5), drop(ones, 0.5)
    torch.manual_seed(5)
    assert torch.equal(drop(ones, 0.5), first)
    assert not torch.equal(first, second)


def test_its_gradient_goes_through_what_was_kept() -> None:
    hidden = torch.randn(1000, requires_grad=True)
    found = drop(hidden, 0.3)
    found.sum().backward()
    assert hidden.grad is not None
    assert torch.equal(hidden.grad == 0, found == 0)
    assert torch.allclose(hidden.grad * hidden, found)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
def test_compiled_it_is_the_same_run_and_two_masks_stay_two() -> None:
    """A compiler that takes two draws of one shape for one would drop the same places twice."""
    twice = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5))
    draw_own_masks(twice)
    ones = torch.ones(4000)
    torch.manual_seed(5)
    eager = twice(ones)
    assert abs(float((eager == 0).double().mean()) - 0.75) < 0.05
    compiled = torch.compile(twice, dynamic=False)
    torch.manual_seed(5)
    assert torch.equal(compiled(ones), eager)


def test_nothing_is_dropped_in_eval_mode_or_at_rate_0() -> None:
    ones = torch.ones(100)
    modules = nn.ModuleList([nn.Dropout(0.5).eval(), nn.Dropout(0.0)])
    draw_own_masks(modules)
    assert all(module(ones) is ones for module in modules)


def test_hooks_on_the_modules_stay() -> None:
    """FSDP2's and ZeRO's residual is kept in fp32 by one; without it bf16 missed its bound."""
    module = nn.Dropout(0.5)
    module.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))
    draw_own_masks(module)
    assert module(torch.ones(100, dtype=torch.bfloat16)).dtype == torch.float32
