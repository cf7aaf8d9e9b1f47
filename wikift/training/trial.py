"""A trial of a run: some steps from its start, nothing of which is kept. Speed, memory, and losses by learning rate."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

import torch

from wikift.base.errors import EnvironmentFault
from wikift.base.world import seed
from wikift.data.store import TokenStore
from wikift.engines.memory import explained
from wikift.settings.run_plan import RunPlan
from wikift.training.loop import accumulate
from wikift.training.resume import Say
from wikift.training.run import prepare, started

_SETTLING = 3  # steps at the start that are not timed: memory is fetched, kernels are chosen


class Trial(NamedTuple):
    """What steps with these learning rates showed."""

    losses: list[float]
    tokens_per_second: float
    memory: str


def try_steps(plan: RunPlan, store: TokenStore, lrs: Sequence[float], say: Say) -> Trial:
    """Train a step with each learning rate from the run's first on; collective. Writes nothing."""
    with started(plan) as (world, stop_signal), contextlib.ExitStack() as stack:
        training, _ = prepare(plan, store, world, None, stop_signal, say)
        stack.enter_context(explained(training.plan.work, world))
        batches, means, settled, begun = training.batches(), list[torch.Tensor](), 0, time.perf_counter()
        for step, lr in enumerate(lrs, 1):
            torch.manual_seed(seed(plan.seed, "dropout", step, world.rank))
            losses, stop = accumulate(training, step, next(batches))
            if stop:
                raise EnvironmentFault("the trial is interrupted")
            training.engine.step(lr)
            means.append(torch.stack(losses).mean())
            if step == min(_SETTLING, len(lrs) - 1):
                float(means[-1])  # waits for the device
                settled, begun = step, time.perf_counter()
        rows = world.exchange(torch.stack(means).tolist())
        speed = (len(lrs) - settled) * plan.tokens_per_step / (time.perf_counter() - begun)
        return Trial([fmean(each) for each in zip(*rows, strict=True)], speed, training.memory())


def rising(steps: int, lowest: float = 1e-7, highest: float = 1.0) -> list[float]:
    """The learning rates of a range test (Smith, arXiv:1506.01186): each the same factor above the one before."""
    return [lowest * (highest / lowest) ** (n / max(1, steps - 1)) for n in range(steps)]


def smoothed(losses: Sequence[float]) -> list[float]:
    """The losses of a range test as fast.ai smooths 100 of them, until they are 4 times the lowest or not finite."""
    mean, curve, kept = 0.0, list[float](), max(0.0, 1 - 2 / len(losses))
    for n, loss in enumerate(losses, 1):
        mean = kept * mean + (1 - kept) * loss
        value = mean / (1 - kept**n)
        if not math.isfinite(value) or value > 4 * min(curve, default=value):
            break
        curve.append(value)
    return curve
