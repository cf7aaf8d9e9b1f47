"""The training loop: one function, in the order of thought. It knows no engine, no file format and no terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from wikift.base.world import seed
from wikift.evaluation.score import Score
from wikift.training.nonfinite import Skips
from wikift.training.patience import Patience
from wikift.training.resume import FOLDER_GONE, add_to_manifest
from wikift.training.training import Training
from wikift.watch.profile import Profiler


def run_steps(training: Training, owed: dict[str, Any] | None, profiler: Profiler) -> int:
    """Train to the last step, or until patience is spent; returns the signal that stopped it, else 0.

    Everything random comes from (seed, step, rank). A stop comes after a micro-batch, discards a step that is not
    complete and saves without validating. `owed` is the line of the step before this start, where a stop interrupted
    its validation or its sample. Raises EnvironmentFault where the loss or the gradient is no longer finite.
    """
    plan, engine, world = training.plan, training.engine, training.world
    due, meter, log, patience = plan.due, training.meter, training.log, training.patience
    if owed is not None:
        patience, stop = _make_up(training, owed)
        if stop or patience.spent:
            return stop
    skips = Skips(training)
    mean = norm = torch.tensor(0.0)
    batches, saved, score, watched = training.batches(), training.done, None, False
    for step in range(training.done + 1, due.steps + 1):
        torch.manual_seed(seed(plan.seed, "dropout", step, world.rank))
        asked = None if due.log(step) or watched else training.ask([log.impatient()])
        with meter.waiting():
            blocks = next(batches)
        losses, stop = accumulate(training, step, blocks)
        if stop:
            skips.check(step - 1, [float(mean)], float(norm))
            anew = step > (1 if stop == FOLDER_GONE else training.done + 1)
            if saved < step - 1 or (anew and (plan.save_only_model or stop == FOLDER_GONE)):
                training.save(step - 1, score.loss if score is not None else None, patience, stop=stop)
            log.say(f"step {step:,} is discarded: {len(losses)} of its {len(blocks)} micro-batches were computed")
            return stop
        norm = engine.step(plan.schedule.lr_at(step))
        skips.count(norm, step)
        meter.step(plan.tokens_per_step)
        mean = torch.stack(losses).mean()
        stop, watched, rows = _exchange(training, mean, asked)
        with meter.paused(False):
            profiler.step()
        record: dict[str, Any] = {"step": step}
        if rows:
            skipped = skips.check(step, [row[0] for row in rows], float(norm))
            record |= _measured(training, step, rows, skipped) | {"grad_norm": float(norm)}
        log.tick(**record)
        with meter.paused(due.evaluate(step)):
            score = training.validate() if due.evaluate(step) and not stop else None
            if score is not None:
                record |= _scored(score) | {"seconds_left": record["seconds_left"] - meter.pause}
                patience = patience.after(score.loss)
            if due.sample(step) and not stop:
                training.sample(step)
            if due.evaluate(step):  # it may have come in the meantime, and cut the validation short
                stop = stop or training.stopped()
                training.check_replicas(step)
            if due.log(step):
                log.record(record | training.saved())
                meter.restart()
            if due.save(step) or stop or patience.spent or (score is not None and patience.is_best):
                training.save(step, score.loss if score is not None else None, patience, stop=stop)
                saved = step
        if stop or patience.spent:
            return stop
    return 0


def accumulate(training: Training, step: int, blocks: list[Tensor]) -> tuple[list[Tensor], int]:
    """The losses of a step's micro-batches, their gradients added up, and the signal that stopped it midway, else 0."""
    name = "first step" if step == training.done + 1 else f"step {step:,}"
    losses: list[Tensor] = []
    for number, block in enumerate(blocks, 1):
        training.log.tick(now=f"{name}: micro-batch {number}/{len(blocks)}")
        if losses and (stop := training.stopped_midway()):
            return losses, stop
        losses.append(training.engine.forward_backward(block, last=number == len(blocks)))
    return losses, 0


def _exchange(
    training: Training, mean: Tensor, asked: Callable[[], tuple[int, list[list[float]]]] | None
) -> tuple[int, bool, list[list[float]]]:
    """(the signal that asks for a stop, whether the live view waits for numbers, every rank's own where they are due).

    Where they are not, it was `asked` as the step began, and nothing waits for a device, or another rank's host.
    """
    log = training.log
    if asked is None:
        stop, rows = training.agree([log.impatient(), *training.meter.own(float(mean), log.pulse.busy())])
        return stop, bool(rows[0][0]), [row[1:] for row in rows]
    stop, rows = asked()
    return stop, bool(rows[0][0]), training.agree(training.meter.own(float(mean), log.pulse.busy()))[1] if stop else []


def _measured(training: Training, step: int, rows: list[list[float]], skipped: int) -> dict[str, Any]:
    plan, due = training.plan, training.plan.due
    overflows = {"skipped_steps": skipped} if skipped or training.plan.work.precision == "fp16" else {}
    reading = training.meter.reading(due.steps - step, due.validations(step - 1), rows)
    fixed = {"learning_rate": plan.schedule.lr_at(step), "tokens": step * plan.tokens_per_step}
    return fixed | overflows | reading


def _scored(score: Score) -> dict[str, Any]:
    return {
        "eval_loss": score.loss,
        "eval_perplexity": score.value("tokens"),
        "eval_word_perplexity": score.value("words"),
    }


def _make_up(training: Training, owed: dict[str, Any]) -> tuple[Patience, int]:
    """Do the validation and the sample that a stop interrupted; returns the signal that interrupts again, else 0."""
    start, due, patience = training.start, training.plan.due, training.patience
    late = start is not None and start.manifest["eval_loss"] is None and due.evaluate(start.step)
    score = training.validate() if late else None
    if score is not None:
        patience, owed = patience.after(score.loss), owed | _scored(score)
    if len(owed) > 1:
        training.log.record(owed)
    if score is not None:
        facts = {"eval_loss": score.loss, **patience.facts()}
        add_to_manifest(training.plan.output_dir, start, training.world, facts)
    stop = training.stopped()
    if due.sample(training.done) and not stop:
        training.sample(training.done)
    return patience, stop
