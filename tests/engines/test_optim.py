"""AdamW, clipping, the loss scale and the learning rate, against torch's and transformers' own."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from wikift.base.work import AdamSettings
from wikift.engines.optim import LossScale, ScaleRule, build_optimizer, clip_and_step, total_norm

CPU = torch.device("cpu")


def adam(**words: float) -> AdamSettings:
    return AdamSettings(
        **{"weight_decay": 0.1, "beta1": 0.9, "beta2": 0.99, "epsilon": 1e-8, "max_grad_norm": 1.0, **words}
    )


def small_model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=8, vocab_size=31))


def gradients(model: nn.Module, scale: float, steps: int = 1) -> Iterator[list[torch.Tensor]]:
    random = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield [torch.randn(p.shape, generator=random) * scale for p in model.parameters()]


def set_gradients(model: nn.Module, values: list[torch.Tensor], factor: float = 1.0) -> None:
    for parameter, value in zip(model.parameters(), values, strict=True):
        parameter.grad = value * factor


# --- groups ------------------------------------------------------------------------------------------------------


def test_what_decays_is_what_the_trainer_decays() -> None:
    from transformers import Trainer

    model = small_model()
    optimizer = build_optimizer(model.parameters(), adam())
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, kept = ({names[p] for p in group["params"]} for group in optimizer.param_groups)
    trainers = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    assert decayed == trainers & set(names.values())
    assert kept == set(names.values()) - decayed
    assert {"transformer.wte.weight", "transformer.wpe.weight", "transformer.h.1.mlp.c_fc.weight"} <= decayed
    assert kept == {name for name in kept if name.endswith("bias") or "ln_" in name}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert all(group["betas"] == (0.9, 0.99) and group["eps"] == 1e-8 for group in optimizer.param_groups)


# --- norm and update ---------------------------------------------------------------------------------------------


def test_the_norm_is_that_of_float64() -> None:
    random = torch.Generator().manual_seed(3)
    shapes = [(5_000_000,), (300, 7), (1,), (2_097_153,), (0,)]
    parts = [torch.randn(shape, generator=random) * 10.0**-i for i, shape in enumerate(shapes)]
    parts.append(torch.randn(64, 33, generator=random).t())  # not contiguous
    exact = math.sqrt(sum(float((part.double() ** 2).sum()) for part in parts))
    assert float(total_norm(parts)) == pytest.approx(exact, rel=2e-7)
    large = torch.randn(20_000_000, generator=random)  # one pass in fp32 reads it 1e-3 low
    assert float(total_norm([large])) == pytest.approx(float(large.double().norm()), rel=2e-7)
    large *= torch.exp(3 * torch.randn(20_000_000, generator=random))  # as gradients are: few large, most small
    assert float(total_norm([large])) == pytest.approx(float(large.double().norm()), rel=2e-7)


@pytest.mark.parametrize("scale", [1e-4, 1.0], ids=["not clipped", "clipped"])
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
@pytest.mark.parametrize("loss_scale", [1.0, 65536.0])
def test_clip_and_step_is_torchs(scale: float, max_grad_norm: float, loss_scale: float) -> None:
    """Eight updates with a rate that changes; the gradients come multiplied by the loss scale, the norm does not."""
    ours, theirs = small_model(), small_model()
    chosen = adam(max_grad_norm=max_grad_norm)
    optimizer, stock = build_optimizer(ours.parameters(), chosen), build_stock(theirs, chosen)
    scaling = LossScale(ScaleRule() if loss_scale != 1.0 else None, CPU)
    assert float(scaling.scale) == loss_scale
    clipped = 0
    for step, values in enumerate(gradients(ours, scale, steps=8), start=1):
        lr = 1e-2 / step
        set_gradients(ours, values, factor=loss_scale)
        norm = total_norm([p.grad for p in ours.parameters() if p.grad is not None]) / loss_scale
        clip_and_step(optimizer, norm, lr, max_grad_norm, scaling)
        set_gradients(theirs, values)
        expected = nn.utils.clip_grad_norm_(theirs.parameters(), max_grad_norm or math.inf)
        assert float(norm) == pytest.approx(float(expected), rel=1e-5)
        clipped += bool(max_grad_norm and expected > max_grad_norm)
        for group in stock.param_groups:
            group["lr"] = lr
        stock.step()
    assert clipped == (8 if max_grad_norm and scale == 1.0 else 0)
    moved = 0.0
    for a, b, c in zip(ours.parameters(), theirs.parameters(), small_model().parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)
        moved = max(moved, float((a - c).detach().abs().max()))
        for name in ("exp_avg", "exp_avg_sq"):  # to the largest: a mean of gradients of both signs may be near 0
            expected = stock.state[b][name]
            error = float((optimizer.state[a][name] - expected).abs().max())
            assert error <= 1e-5 * float(expected.abs().max())  # torch clips by norm + 1e-6
        assert float(optimizer.state[a]["step"]) == 8
    assert moved > 1e-2


def build_stock(model: nn.Module, chosen: AdamSettings) -> torch.optim.AdamW:
    """torch's AdamW as its documentation builds it, neither fused nor told a scale."""
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if "ln_" not in n and n.endswith("weight")], "weight_decay": 0.1},
        {"params": [p for n, p in named if n.endswith(".bias") or "ln_" in n], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(chosen.beta1, chosen.beta2), eps=chosen.epsilon, foreach=False)


# --- a gradient that is not finite -------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_gradient_that_is_not_finite_changes_nothing_but_the_scale(bad: float, dynamic: bool) -> None:
    model = small_model()
    optimizer, scaling = build_optimizer(model.parameters(), adam()), LossScale(ScaleRule() if dynamic else None, CPU)
    good, broken = gradients(model, 1.0, steps=2)

    def update(values: list[torch.Tensor]) -> None:
        set_gradients(model, values)
        norm = total_norm([p.grad for p in model.parameters() if p.grad is not None]) / scaling.scale
        clip_and_step(optimizer, norm, 1e-2, 1.0, scaling)

    update(good)
    weights = copy.deepcopy(model.state_dict())
    states = copy.deepcopy(optimizer.state_dict()["state"])
    scale = float(scaling.scale)
    assert float(scaling.good_steps) == (1 if dynamic else 0)
    broken[3].view(-1)[0] = bad
    update(broken)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    for number, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, states[number][name]) for name, value in state.items())
        assert float(state["step"]) == 1
    assert float(scaling.scale) == (scale / 2 if dynamic else 1.0)
    assert float(scaling.good_steps) == 0
    update(good)  # and it goes on
    assert not torch.equal(model.transformer.wte.weight, weights["transformer.wte.weight"])
    assert all(float(state["step"]) == 2 for state in optimizer.state_dict()["state"].values())


def test_the_scale_grows_after_2000_good_steps_as_grad_scalers() -> None:
    """The whole course of the scale, with overflows now and then, is that of torch's own rule."""
    random = np.random.default_rng(0)
    finite = random.random(9000) > 0.0004
    assert 1 < (~finite).sum() < 10
    ours = LossScale(ScaleRule(), CPU)
    scale, tracker = torch.tensor(65536.0), torch.tensor(0, dtype=torch.int32)
    seen = set()
    for good in finite:
        ours.update(torch.tensor(bool(good)))
        torch._amp_update_scale_(scale, tracker, torch.tensor(float(not good)), 2.0, 0.5, 2000)
        assert (float(ours.scale), float(ours.good_steps)) == (float(scale), float(tracker))
        seen.add(float(scale))
    assert len(seen) >= 3


def course(rule: ScaleRule, overflows: str) -> list[float]:
    """The scale after each step, `x` an overflow."""
    scaling = LossScale(rule, CPU)
    found = []
    for step in overflows:
        scaling.update(torch.tensor(step != "x"))
        found.append(float(scaling.scale))
    return found


def test_hysteresis_minimum_and_a_fixed_scale() -> None:
    assert course(ScaleRule(initial=8, hysteresis=2, window=3), "xx.x...xx") == [8, 4, 4, 4, 4, 4, 8, 8, 4]
    assert course(ScaleRule(initial=4, smallest=2), "xxx") == [2, 2, 2]
    assert course(ScaleRule(initial=4, window=1, dynamic=False), "x..x") == [4, 4, 4, 4]


def test_a_saved_scale_goes_on_and_none_starts_anew() -> None:
    saved = LossScale(ScaleRule(initial=8), CPU)
    saved.update(torch.tensor(False))
    restored = LossScale(ScaleRule(initial=1024), CPU)
    restored.restore(*saved.numbers())
    assert [float(n) for n in restored.numbers()] == [float(n) for n in saved.numbers()] == [4, 0, 0]
    from_fp32 = LossScale(ScaleRule(initial=1024), CPU)
    from_fp32.restore(*LossScale(None, CPU).numbers())
    assert float(from_fp32.scale) == 1024
