"""How many steps a run has, and how many of them its rate rises, falls and is measured by."""

from __future__ import annotations

import math

from wikift.settings.fields import TrainSettings


def epoch_steps(epochs: float | None, blocks: int, global_batch: int) -> int:
    """Epochs rounded up to a whole step."""
    assert epochs is not None
    # rounded to a millionth of a step first: 1.1 epochs of 50 steps are 55, though 1.1 * 50 is above 55
    return max(1, math.ceil(round(epochs * blocks / global_batch, 6)))


def warmup_steps(settings: TrainSettings, steps: int) -> int:
    """Updates over which the rate rises. A part of the run is rounded up, and leaves one update at the full rate."""
    asked = _of_run(settings.warmup_steps, steps)
    return asked if settings.warmup_steps >= 1 else min(asked, steps - 1)


def decay_steps(settings: TrainSettings, steps: int) -> int:
    """Updates over which the rate of warmup_stable_decay falls, by default a fifth; 0 for other courses."""
    if settings.lr_scheduler_type != "warmup_stable_decay":
        return 0
    return _of_run(0.2 if settings.decay_steps is None else settings.decay_steps, steps)


def _of_run(asked: float, steps: int) -> int:
    # rounded to a millionth of a step first: 0.07 of 100 steps are 7, though 0.07 * 100 is above 7
    return int(asked) if asked >= 1 else math.ceil(round(asked * steps, 6))


def validations(steps: int, eval_steps: int, save_steps: int) -> int:
    """How many validations a run has: each save validates too, and so does the last step."""
    due = steps // eval_steps + steps // save_steps - steps // math.lcm(eval_steps, save_steps)
    return due + (steps % eval_steps != 0 and steps % save_steps != 0)


def length_problems(settings: TrainSettings, steps: int) -> list[str]:
    """What cannot be in a run of `steps` steps."""
    problems = []
    warmup, decay = warmup_steps(settings, steps), decay_steps(settings, steps)
    if warmup >= steps:
        problems.append(
            f"--warmup-steps {warmup}: must be less than the run's {steps} steps; take fewer, or a part below 1"
        )
    elif warmup + decay > steps:
        problems.append(
            f"--decay-steps {decay}: is with --warmup-steps {warmup} more than the run's {steps} steps; take fewer, or "
            "a part below 1"
        )
    patience = settings.early_stopping_patience
    count = validations(steps, settings.eval_steps or settings.save_steps, settings.save_steps)
    if (
        patience is not None and patience > count - 2
    ):  # the first is always the best; after the last the run ends anyway
        fewer = f"take {count - 2} or less, or " if count > 2 else ""
        problems.append(
            f"--early-stopping-patience {patience}: cannot act, the run has {count} validation{'s' * (count != 1)}; "
            f"{fewer}validate more often with --eval-steps"
        )
    return problems
