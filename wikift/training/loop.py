"""The training loop: one function, in the order of thought. It knows no engine, no file format and no terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wikift.base.errors import EnvironmentFault
from wikift.base.world import World, seed
from wikift.engines.base import Engine
from wikift.engines.optim import Schedule
from wikift.evaluation.score import Score
from wikift.training.meter import Meter
from wikift.training.patience import Patience
from wikift.watch.metrics import Log


@dataclass(frozen=True)
class Due:
    """Steps between log lines, validations and checkpoints; a save validates first, the last step does all."""

    logging_steps: int
    eval_steps: int
    save_steps: int
    steps: int
    sample_steps: int = 0  # 0: never

    def sample(self, step: int) -> bool:
        return self.sample_steps > 0 and (step % self.sample_steps == 0 or step == self.steps)

    def log(self, step: int) -> bool:
        return step % self.logging_steps == 0 or step == 1 or self.evaluate(step)

    def evaluate(self, step: int) -> bool:
        return step % self.eval_steps == 0 or self.save(step)

    def save(self, step: int) -> bool:
        return step % self.save_steps == 0 or step == self.steps


@dataclass(frozen=True)
class Job:
    """What the loop is to do; the functions are collective."""

    batches: Callable[[int], Iterator[list[Tensor]]]  # from a step on, counted from 0: each step's micro-batches
    schedule: Schedule
    due: Due
    meter: Meter
    tokens_per_step: int
    run_seed: int
    skips_overflow: bool  # fp16: a gradient that overflows is skipped and counted, elsewhere it ends the run
    skipped: int  # steps skipped before this start
    patience: Patience  # as the steps before this start left it
    owed: dict[str, Any] | None  # the line of the step before this start, where a stop cut short its validation
    amend: Callable[[float, Patience], None]  # write what came of it into that step's checkpoint
    validate: Callable[[], Score | None]
    sample: Callable[[int], None]  # let the model write
    save: Callable[[int, float | None, Patience], None]  # (step, eval_loss, ...)
    saved: Callable[[], dict[str, Any]]  # what to log of a checkpoint published meanwhile; not collective
    # the signal that asks for a stop (0 while there is none) and the sums of numbers over the ranks, at one blow
    agree: Callable[[Sequence[float]], tuple[int, list[float]]]

    def stopped(self) -> int:
        """The signal that asks for a stop; collective."""
        return self.agree(())[0]


def run_steps(engine: Engine, job: Job, world: World, log: Log, *, done: int) -> int:
    """Train from step `done` + 1 to the last, or till patience is spent; gives the signal that stopped it, else 0.

    Everything random comes from (run_seed, step, rank). A stop finishes the step and saves without validating. Raises
    EnvironmentFault where the loss or the gradient is no longer finite.
    """
    due, meter, patience = job.due, job.meter, job.patience
    if job.owed is not None:
        patience, stop = _validate_late(job, log)
        if stop or patience.spent:
            return stop
    skipped = torch.tensor(float(job.skipped), device=world.device)
    batches = job.batches(done)
    for step in range(done + 1, due.steps + 1):
        torch.manual_seed(seed(job.run_seed, "dropout", step, world.rank))
        with meter.waiting():
            blocks = next(batches)
        lr = job.schedule.lr_at(step)
        losses = [engine.forward_backward(b, last=i == len(blocks) - 1) for i, b in enumerate(blocks)]
        norm = engine.step(lr)
        skipped += ~torch.isfinite(norm)
        meter.step(job.tokens_per_step)
        log.tick(step=step)
        record: dict[str, Any] = {"step": step}
        mean = torch.stack(losses).mean()
        stop, total = job.agree([float(mean)] if due.log(step) else [])  # without a log line nothing waits for a device
        if due.log(step) or stop:
            loss = (total or job.agree([float(mean)])[1])[0] / world.size
            if not math.isfinite(loss) or (skipped.item() > job.skipped and not job.skips_overflow):
                raise EnvironmentFault(diverged(step, loss, float(norm), lr))
            record |= {
                "loss": loss,
                "grad_norm": float(norm),
                "learning_rate": lr,
                "tokens": step * job.tokens_per_step,
            }
            record |= {"skipped_steps": int(skipped)} if job.skips_overflow else {}
            record |= meter.reading(due.steps - step, world.size) | job.saved()
        with meter.paused():
            score = job.validate() if due.evaluate(step) and not stop else None
            if score is not None:
                record |= _scored(score)
                patience = patience.after(score.loss)
            if due.sample(step) and not stop:
                job.sample(step)
            if due.evaluate(step):  # it may have come in the meantime, and cut the validation short
                stop = stop or job.stopped()
            if due.log(step):
                log.record(record)
            if due.save(step) or stop or patience.spent or (score is not None and patience.is_best):
                job.save(step, score.loss if score is not None else None, patience)
        if stop or patience.spent:
            return stop
    return 0


def _scored(score: Score) -> dict[str, Any]:
    return {
        "eval_loss": score.loss,
        "eval_perplexity": score.perplexity,
        "eval_word_perplexity": score.word_perplexity,
    }


def _validate_late(job: Job, log: Log) -> tuple[Patience, int]:
    """Make up for the validation that a stop cut short; gives the signal that cuts it short again, else 0."""
    assert job.owed is not None
    score = job.validate()
    if score is None:
        log.record(job.owed)
        return job.patience, job.stopped()
    patience = job.patience.after(score.loss)
    log.record(job.owed | _scored(score))
    job.amend(score.loss, patience)
    return patience, 0


def diverged(step: int, loss: float, norm: float, lr: float) -> str:
    return (
        f"the loss is {loss} and the gradient's norm {norm} at step {step}, learning rate {lr:g}: training has "
        "diverged. Start anew with a lower --learning-rate or more --warmup-steps; the checkpoints are as they were"
    )
