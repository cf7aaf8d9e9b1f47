"""Steps whose gradient was not finite: skipped and counted on the device, and looked at where a line is due.

--on-nonfinite rewind resumes before such a step, without the blocks of the steps up to it: which blocks a step reads
stays a function of its number and of how many steps' blocks were left out before it, which checkpoints record. A run
that is killed in between comes to the same step again, and rewinds again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from wikift.base.errors import EnvironmentFault
from wikift.base.files import faults_of_writing
from wikift.base.folders import WANDB_ID, list_checkpoints, step_of
from wikift.checkpoint.reader import open_sound
from wikift.training import resume
from wikift.training.training import Training
from wikift.watch.health import MOST_SKIPPED, not_finite

_MOST_REWINDS = 3  # to one checkpoint: what comes again and again is not the data's fault


class Diverged(EnvironmentFault):
    """Training has, with `step`: the last one that was not finite."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class Skips:
    """How many steps were skipped, how many of them in a row, and which was the last."""

    def __init__(self, training: Training) -> None:
        self.training, self.known = training, training.skipped
        self.counts = torch.tensor([float(self.known), 0.0, 0.0], device=training.world.device)

    def count(self, norm: Tensor, step: int) -> None:
        """Take the gradient's norm of `step`; nothing waits for it."""
        total, in_row, last = self.counts
        bad = ~torch.isfinite(norm)
        self.counts = torch.stack((total + bad, (in_row + 1) * bad, torch.where(bad, float(step), last)))

    def check(self, step: int, losses: Sequence[float], norm: float) -> int:
        """The steps skipped so far; an event where there are new ones. `losses` are the ranks' at `step`.

        Raises Diverged where training has. A gradient may overflow in fp16, which moves its scale.
        """
        training, loss = self.training, fmean(losses)
        skipped, in_row, last = map(int, self.counts.tolist())
        new, self.known = skipped - self.known, skipped
        skip, fp16 = training.plan.settings["on_nonfinite"] == "skip", training.plan.work.precision == "fp16"
        applied = not math.isfinite(loss) and math.isfinite(norm)
        lost = not math.isfinite(loss) and not skip
        if in_row > MOST_SKIPPED or applied or lost or (new and not fp16 and not skip):
            raise Diverged(_diverged(training, step, loss, norm, new, last), last if new else step)
        if new and not (fp16 and math.isfinite(loss)):
            training.log.event(not_finite(step, losses, new, last))
        return skipped


def _diverged(training: Training, step: int, loss: float, norm: float, new: int, last: int) -> str:
    lr = training.plan.schedule.lr_at(step)
    since = f", the gradient of step {last} not finite" if new and last != step else ""
    skip = "; --on-nonfinite skip continues without single bad steps, rewind without the blocks that led to them"
    return (
        f"the loss is {loss} and the gradient's norm {norm} at step {step}{since}, learning rate {lr:g}: training has "
        f"diverged. Restart with a lower --learning-rate or more --warmup-steps; the checkpoints are as they were"
        + ("" if training.plan.settings["on_nonfinite"] != "stop" else skip)
    )


def rewound(training: Training, diverged: Diverged, times: int) -> tuple[Training, dict[str, Any]]:
    """`training` after the newest checkpoint before the step that `diverged`, and the event; collective.

    Raises `diverged` where that is not asked for, there is no such checkpoint, or it was resumed so `times` already.
    """
    plan, world = training.plan, training.world
    if plan.settings["on_nonfinite"] != "rewind":
        raise diverged
    training.saver.finish()
    earlier = world.shared([str(path) for path in list_checkpoints(plan.output_dir) if step_of(path) < diverged.step])
    if not earlier:
        raise diverged
    start = open_sound(Path(earlier[-1]), world)
    if start.step == training.done and times >= _MOST_REWINDS:
        raise diverged
    if world.rank == 0:
        with faults_of_writing(plan.output_dir):
            resume.set_aside(plan.output_dir, start)
            (plan.output_dir / WANDB_ID).unlink(missing_ok=True)  # its run has the steps that come again
    world.barrier()
    training.engine.restore(start)
    training.meter.restart()
    left_out = training.left_out + diverged.step - start.step
    message = (
        f"step {diverged.step:,} was not finite: training continues after this step, without the blocks of "
        f"{diverged.step - start.step:,} steps ({left_out:,} since the run's start)"
    )
    event = {"step": start.step, "event": "rewind", "message": message}
    return dataclasses.replace(training, start=start, left_out=left_out), event
