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
