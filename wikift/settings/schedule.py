"""How many steps a run has, the learning rate at each of them, and what is due after which."""

from __future__ import annotations

import math
from dataclasses import dataclass

from wikift.settings.fields import TrainSettings


@dataclass(frozen=True)
class Schedule:
    """The learning rate over a run of `steps` updates, `warmup` of them rising from 0 (transformers' shapes)."""

    kind: str
    peak: float
    warmup: int
    steps: int

    def lr_at(self, step: int) -> float:
        """The learning rate of update `step`, counted from 1, as get_scheduler has it after step - 1 updates."""
        done = step - 1
        if done < self.warmup:
            return self.peak * done / self.warmup
        part = (done - self.warmup) / max(1, self.steps - self.warmup)
        if self.kind == "constant":
            return self.peak
        if self.kind == "cosine":
            return self.peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * part)))
        assert self.kind == "linear"
        return self.peak * max(0.0, 1.0 - part)


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

    def validations(self, after: int = 0) -> int:
        """How many validations the run has after the step `after`."""

        def until(step: int) -> int:
            both = step // math.lcm(self.eval_steps, self.save_steps)
            return step // self.eval_steps + step // self.save_steps - both

        return until(self.steps - 1) + 1 - until(after) if after < self.steps else 0


def schedule_of(settings: TrainSettings, steps: int) -> Schedule:
    """The schedule of a run of `steps` steps, the settings resolved.

    A part of the run is rounded up; a warm-up given as a part leaves one update at the full learning rate.
    """
    kind, peak = settings.lr_scheduler_type, settings.learning_rate or 0.0
    # rounded to a millionth of a step first: 0.07 of 100 steps are 7, though 0.07 * 100 is above 7
    part = min(math.ceil(round(settings.warmup_steps * steps, 6)), steps - 1)
    warmup = part if settings.warmup_steps < 1 else int(settings.warmup_steps)
    return Schedule(kind, peak, warmup, steps)


def due_of(settings: TrainSettings, steps: int) -> Due:
    eval_steps = settings.eval_steps or settings.save_steps
    sample_steps = (settings.sample_steps or eval_steps) if settings.sample_prompts else 0
    return Due(settings.logging_steps, eval_steps, settings.save_steps, steps, sample_steps)


def epoch_steps(epochs: float, blocks: int, global_batch: int) -> int:
    """Epochs rounded up to a whole step."""
    # rounded to a millionth of a step first: 1.1 epochs of 50 steps are 55, though 1.1 * 50 is above 55
    return max(1, math.ceil(round(epochs * blocks / global_batch, 6)))


def length_problems(settings: TrainSettings, steps: int) -> list[str]:
    problems = []
    if (warmup := schedule_of(settings, steps).warmup) >= steps:
        problems.append(
            f"--warmup-steps {warmup}: must be less than the run's {steps} steps; use fewer, or a fraction below 1"
        )
    if settings.profile is not None and settings.profile > steps - 2:
        problems.append(
            f"--profile {settings.profile}: the run has {steps} steps, and the first 2 are not profiled; take "
            f"{max(1, steps - 2)} or fewer, or a longer run"
        )
    patience, count = settings.early_stopping_patience, due_of(settings, steps).validations()
    # the first validation is always the best one; after the last the run ends anyway
    if patience is not None and patience > count - 2:
        fewer = f"take {count - 2} or less, or " if count > 2 else ""
        problems.append(
            f"--early-stopping-patience {patience}: has no effect, the run has {count} validation{'s' * (count != 1)}; "
            f"{fewer}validate more often with --eval-steps"
        )
    return problems
