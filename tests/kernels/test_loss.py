"""The head's loss and its gradients are those of torch's linear and cross_entropy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ranks import each, run_ranks
from tests.tiny_engines import make_engine, random_start, tiny_config
from wikift import kernels
from wikift.kernels import loss as head


def numbers(
    positions: int, vocabulary: int = 5000, width: int = 32, spread: float = 1.0, seed: int = 0
) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    targets = torch.randint(vocabulary, (positions,), generator=random)
    targets[::5] = head.NOT_SCORED
    hidden = torch.randn(positions, width, generator=random) * spread
    return [hidden, torch.randn(vocabulary, width, generator=random), targets]


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


def graded(
    loss_of: Callable[..., Tensor], given: list[Tensor], factor: float, low: torch.dtype | None = None
) -> list[Tensor]:
    """The loss in autocast to `low`, and its gradients times `factor`."""
    hidden, weight = (tensor.clone().requires_grad_() for tensor in given[:2])
    with torch.autocast("cpu", low, enabled=low is not None):
        loss = loss_of(hidden, weight, given[2])
    (loss * factor).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return [loss.detach().double(), hidden.grad, weight.grad]


def distance(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right.double()).norm() / right.double().norm())


def as_on_a_gpu(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32
    return head.graded_loss(hidden, weight, targets, dtype, head._to_gradient)


LOW = torch.bfloat16
WAYS = pytest.mark.parametrize("way", [head.summed_loss, as_on_a_gpu], ids=["cpu", "gpu"])


@WAYS
@pytest.mark.parametrize("positions", [1, 7, 64, 5000])  # the last in more than one block of rows
@pytest.mark.parametrize("factor", [1.0, 0.37])
def test_equal_to_the_plain_loss(positions: int, factor: float, way: Callable[..., Tensor]) -> None:
    given = numbers(positions)
    given[2][-1] = 3
    for found, right in zip(
        graded(way, given, factor / positions), graded(plain, given, factor / positions), strict=True
    ):
        assert distance(found, right) < 2e-6


def test_without_gradients_it_is_the_same_sum() -> None:
    given = numbers(300)
    with torch.no_grad():
        assert float(head.summed_loss(*given)) == pytest.approx(float(plain(*given)), rel=1e-6)
        with torch.autocast("cpu", torch.float16):  # in chunks of the rows over a padded vocabulary, as on a GPU
            assert float(head.summed_loss(*given)) == pytest.approx(float(plain(*given)), rel=1e-4)
    given[2].fill_(head.NOT_SCORED)
    with torch.no_grad():
        assert float(head.summed_loss(*given)) == 0.0


@pytest.mark.parametrize(("positions", "chunk"), [(300, 75), (256, 64), (70, 70)])
def test_a_gpu_pads_the_vocabulary_and_holds_a_few_rows_logits(
    positions: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5,000 entries are 5,056 in memory, and the chunks are of one shape, which is compiled once."""
    shapes = []

    def seen(logits: Tensor, targets: Tensor, share: float) -> tuple[Tensor, Tensor]:
        shapes.append((tuple(logits.shape), logits.is_contiguous()))
        return head._to_gradient(logits, targets, share)

    monkeypatch.setattr(head, "_LOGIT", (2 << 30) // (100 * 5000))  # of 100 rows at most
    hidden, weight, targets = numbers(positions)
    head.graded_loss(hidden.requires_grad_(), weight, targets, torch.float32, seen)
    assert shapes == [((chunk, 5056), True)] * (positions // chunk)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
@pytest.mark.parametrize("spread", [1.0, 30.0])  # the second with losses of hundreds of nats
def test_the_passes_compiled_are_those_of_eager(spread: float) -> None:
    given = numbers(96, spread=spread)
    compiled = partial(head.graded_loss, dtype=torch.float32, to_gradient=head.compiled_passes())
    for found, right in zip(graded(compiled, given, 1 / 96), graded(plain, given, 1 / 96), strict=True):
        assert distance(found, right) < 2e-6


@WAYS
def test_a_target_that_is_hopeless_is_no_overflow(way: Callable[..., Tensor]) -> None:
    """Losses of hundreds of nats: exp(logit - target's) leaves fp32's range."""
    given = numbers(50, spread=30.0)
    with torch.no_grad():
        assert float(plain(*given)) / 40 > 100
    for found, right in zip(graded(way, given, 0.02), graded(plain, given, 0.02), strict=True):
        assert torch.isfinite(found).all()
        assert distance(found, right) < 2e-6


@pytest.mark.parametrize("seed", range(5))
def test_bf16_is_no_further_from_fp32_than_the_plain_loss_in_bf16(seed: int) -> None:
    given = numbers(512, seed=seed, spread=0.5)
    right, stock, found = (
        graded(f, given, 1 / 512, low) for f, low in ((plain, None), (plain, LOW), (head.summed_loss, LOW))
    )
    for ours, theirs, exact in zip(found[1:], stock[1:], right[1:], strict=True):
        assert distance(ours, exact) <= distance(theirs, exact)


def test_bf16_on_a_gpu_rounds_what_the_plain_loss_in_bf16_rounds() -> None:
    """The logits, and their gradient; so it is as far from fp32 as that, to the order of the sums."""
    given = numbers(512, spread=0.5)
    right, stock, found = (
        graded(f, given, 1 / 512, low) for f, low in ((plain, None), (plain, LOW), (as_on_a_gpu, LOW))
    )
    for ours, theirs, exact in zip(found[1:], stock[1:], right[1:], strict=True):
        assert distance(ours, theirs) < 0.1 * distance(theirs, exact)


@pytest.mark.parametrize("seed", range(3))
def test_fp16_is_no_further_from_fp32_than_the_plain_loss_in_fp16(seed: int) -> None:
    """Both with a loss scale."""
    given, scale = numbers(512, seed=seed, spread=0.5), 1024.0
    right = graded(plain, given, scale / 512)
    stock, found = (graded(f, given, scale / 512, torch.float16) for f in (plain, head.summed_loss))
    for ours, theirs, exact in zip(found[1:], stock[1:], right[1:], strict=True):
        assert distance(ours, exact) <= 1.02 * distance(theirs, exact)


def test_fp16_holds_a_gradient_of_many_equal_rows() -> None:
    """Their sum, 80,000, is above fp16's range."""
    hidden, weight, _ = numbers(4096, vocabulary=100)
    given = [torch.full_like(hidden, 20.0), weight * 0.01, torch.full((4096,), 3)]
    _, _, of_weight = graded(head.summed_loss, given, 1.0, torch.float16)
    assert float(of_weight[3].abs().min()) > 65504
    assert torch.isfinite(of_weight).all()


def trained(precision: str, seed: int, plain: bool) -> list[float]:
    """Twenty steps' losses of one process, its vocabulary more than two chunks, with the kernels or their twins."""
    from wikift.base.world import start_world

    kernels.plain = plain
    config = tiny_config(vocab_size=5000)
    engine: Any = make_engine("single", start_world("cpu"), config, precision=precision)
    engine.restore(random_start(config, seed))
    random = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(20):
        losses.append(float(engine.forward_backward(torch.randint(5000, (4, 9), generator=random), last=True)))
        engine.step(3e-3)
    return losses


def test_twenty_steps_are_those_of_the_plain_twins_and_in_bf16_no_further_from_fp32() -> None:
    """In bf16 over five seeds together: one run's rounding is luck."""
    cases = [(precision, seed, plain) for precision in ("fp32", "bf16") for seed in range(5) for plain in (False, True)]
    losses = dict(zip(cases, run_ranks(each, 1, trained, cases)[0], strict=True))
    assert losses["fp32", 0, False] == pytest.approx(losses["fp32", 0, True], abs=1e-5)
    assert losses["fp32", 0, False] != losses["fp32", 0, True], "one of the two is not what it should be"
    ours, twins = (
        np.mean([np.abs(np.subtract(losses["bf16", seed, plain], losses["fp32", seed, True])) for seed in range(5)])
        for plain in (False, True)
    )
    assert ours <= twins
