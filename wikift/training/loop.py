"""The training loop: one function, in the order of thought. It knows no engine, no file format and no terminal."""

from __future__ import annotations

import math
from typing import Any

import torch

from wikift.base.errors import EnvironmentFault
from wikift.base.world import seed
from wikift.evaluation.score import Score
from wikift.training.patience import Patience
from wikift.training.resume import add_to_manifest
from wikift.training.training import Training


def run_steps(training: Training, owed: dict[str, Any] | None) -> int:
    """Train to the last step, or until patience is spent; returns the signal that stopped it, else 0.

    Everything random comes from (seed, step, rank). A stop finishes the step and saves without validating. `owed` is
    the line of the step before this start, where a stop interrupted its validation. Raises EnvironmentFault where the
    loss or the gradient is no longer finite.
    """
    plan, engine, world = training.plan, training.engine, training.world
    due, meter, log, patience = plan.due, training.meter, training.log, training.patience
    may_overflow = training.precision.name == "fp16"  # elsewhere a gradient that overflows ends the run
    if owed is not None:
        patience, stop = _validate_late(training, owed)
        if stop or patience.spent:
            return stop
    skipped = torch.tensor(float(before := training.skipped), device=world.device)
    batches = training.batches()
    for step in range(training.done + 1, due.steps + 1):
        torch.manual_seed(seed(plan.seed, "dropout", step, world.rank))
        with meter.waiting():
            blocks = next(batches)
        lr = plan.schedule.lr_at(step)
        losses = [engine.forward_backward(b, last=i == len(blocks) - 1) for i, b in enumerate(blocks)]
        norm = engine.step(lr)
        skipped += ~torch.isfinite(norm)
        meter.step(plan.tokens_per_step)
        log.tick(step=step)
        record: dict[str, Any] = {"step": step}
        mean = torch.stack(losses).mean()
        # without a log line nothing waits for a device
        stop, total = training.agree([float(mean)] if due.log(step) else [])
        if due.log(step) or stop:
            loss = (total or training.agree([float(mean)])[1])[0] / world.size
            if not math.isfinite(loss) or (skipped.item() > before and not may_overflow):
                raise EnvironmentFault(diverged(step, loss, float(norm), lr))
            record |= {
                "loss": loss,
                "grad_norm": float(norm),
                "learning_rate": lr,
                "tokens": step * plan.tokens_per_step,
            }
            record |= {"skipped_steps": int(skipped)} if may_overflow else {}
            record |= meter.reading(due.steps - step, world.size) | training.saved()
        with meter.paused():
            score = training.validate() if due.evaluate(step) and not stop else None
            if score is not None:
                record |= _scored(score)
                patience = patience.after(score.loss)
            if due.sample(step) and not stop:
                training.sample(step)
            if due.evaluate(step):  # it may have come in the meantime, and cut the validation short
                stop = stop or training.stopped()
            if due.log(step):
                log.record(record)
            if due.save(step) or stop or patience.spent or (score is not None and patience.is_best):
                training.save(step, score.loss if score is not None else None, patience)
        if stop or patience.spent:
            return stop
    return 0


def _scored(score: Score) -> dict[str, Any]:
    return {
        "eval_loss": score.loss,
        "eval_perplexity": score.value("tokens"),
        "eval_word_perplexity": score.value("words"),
    }


def _validate_late(training: Training, owed: dict[str, Any]) -> tuple[Patience, int]:
    """Run the validation that a stop interrupted; returns the signal that interrupts it again, else 0."""
    score = training.validate()
    if score is None:
        training.log.record(owed)
        return training.patience, training.stopped()
    patience = training.patience.after(score.loss)
    training.log.record(owed | _scored(score))
    add_to_manifest(
        training.plan.output_dir, training.start, training.world, {"eval_loss": score.loss, **patience.facts()}
    )
    return patience, 0


def diverged(step: int, loss: float, norm: float, lr: float) -> str:
    return (
        f"the loss is {loss} and the gradient's norm {norm} at step {step}, learning rate {lr:g}: training has "
        "diverged. Restart with a lower --learning-rate or more --warmup-steps; the checkpoints are as they were"
    )
