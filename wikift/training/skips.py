"""Steps whose gradient was not finite: skipped and counted on the device, and looked at where a line is due."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor

from wikift.base.errors import EnvironmentFault
from wikift.training.training import Training
from wikift.watch.health import MOST_SKIPPED, not_finite


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
        skip, fp16 = training.plan.settings["on_nonfinite"] == "skip", training.precision.name == "fp16"
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
