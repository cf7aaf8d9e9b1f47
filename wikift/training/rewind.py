"""--on-nonfinite rewind: resume before a step that was not finite, without the blocks of the steps up to it.

Which blocks a step reads stays a function of its number and of how many steps' blocks were left out before it, which
checkpoints record. A run that is killed in between comes to the same step again, and rewinds again.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from wikift.base.files import faults_of_writing
from wikift.base.folders import WANDB_ID, list_checkpoints, step_of
from wikift.checkpoint.reader import open_sound
from wikift.training import resume
from wikift.training.skips import Diverged
from wikift.training.training import Training

_MOST_REWINDS = 3  # to one checkpoint: what comes again and again is not the data's fault


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
