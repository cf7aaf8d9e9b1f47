"""What the loop of a run is given: its numbers, and what it may call."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from wikift.base.folders import step_of
from wikift.base.world import World
from wikift.checkpoint.reader import Checkpoint
from wikift.checkpoint.writer import Saver
from wikift.data.batches import ahead, count_blocks, micro_batches, sample_blocks
from wikift.data.store import TokenStore
from wikift.engines.base import OPTIMIZER
from wikift.engines.build import Built
from wikift.engines.optim import Schedule
from wikift.evaluation.score import Score, score_split
from wikift.generation.live import sample_live
from wikift.generation.prompts import read_prompts
from wikift.generation.sampler import Sampling
from wikift.model.gpt2 import Precision
from wikift.settings.fields import TrainSettings
from wikift.settings.run_plan import Plan
from wikift.training import resume
from wikift.training.loop import Due, Job
from wikift.training.meter import Meter, peak_flops
from wikift.training.patience import Patience, patience_of
from wikift.training.resume import experiment
from wikift.watch.metrics import Log

_SAMPLE_TOKENS = 64
_SAVE_FAILED = 1 << 16  # above every signal's number


@dataclass(frozen=True)
class Run:
    """What every part of a run is made from."""

    folder: Path
    settings: TrainSettings
    plan: Plan
    store: TokenStore
    world: World
    precision: Precision


class _CutShort(Exception):
    """A stop was asked for while validating."""


@dataclass(frozen=True)
class Parts:
    """A run that is about to train; its methods, the loop's functions, are collective."""

    run: Run
    built: Built
    log: Log
    saver: Saver
    stop_signal: Callable[[], int]
    validates: bool
    prompts: list[str]

    def validate(self) -> Score | None:
        if not self.validates:
            return None
        settings, plan = self.run.settings, self.run.plan
        with self.built.engine.averaged():
            try:
                return score_split(
                    self.built.engine.nll, self.run.store, "validation", context=plan.block_size,
                    stride=plan.block_size, batch=settings.per_device_eval_batch_size, world=self.run.world,
                    progress=self._progress,
                )  # fmt: skip
            except _CutShort:
                self.log.say("the validation is cut short")
                return None
            finally:
                self.log.tick(now=None)

    def _progress(self, done: int, of: int) -> None:
        self.log.tick(now=f"validating {done:,}/{of:,}")
        if self.agree(())[0]:
            raise _CutShort  # torchrun waits 30 s after a signal, a validation on CPU may take minutes

    def sample(self, step: int) -> None:
        self.log.tick(now="writing samples")
        tokenizer = AutoTokenizer.from_pretrained(self.run.store.path / "tokenizer")
        with self.built.engine.averaged():
            texts = sample_live(
                self.built.engine.next_logits, tokenizer, self.prompts, sampling=Sampling(0.8, 50, 0.95, 1.1),
                max_new_tokens=_SAMPLE_TOKENS, seed=self.run.settings.seed,
                positions=self.run.plan.shape.n_positions,
            )  # fmt: skip
        self.log.samples(step, self.prompts, texts)
        self.log.tick(now=None)

    def save(self, step: int, eval_loss: float | None, patience: Patience) -> None:
        settings, plan, store = self.run.settings, self.run.plan, self.run.store
        self.log.tick(now="saving")
        about = {
            "tokens": step * plan.tokens_per_step,
            "eval_loss": eval_loss,
            **patience.facts(),
            "settings": dataclasses.asdict(settings),
            "experiment": experiment(settings, plan, store),
            "model_config": json.loads(self.built.config.to_json_string(use_diff=False)),
        }
        shapes = {name: list(shape) for name, shape in self.built.shapes.items()}
        self.saver.save(self.built.engine.fragments(), step, about, shapes)
        self.log.tick(now=None)
        if patience.spent:
            self.log.say(
                f"stopped early at step {step:,}: {patience.worse} validations in a row were no better than "
                f"{patience.best:.4f}"
            )

    def saved(self) -> dict[str, Any]:
        """Not collective."""
        found = self.saver.take_saved()
        if found is None:
            return {}
        self.log.tick(saved=found.path.name)
        step = step_of(found.path)
        return {"saved_step": step, "save_stall_seconds": found.stall_seconds, "save_seconds": found.seconds}

    def agree(self, numbers: Sequence[float]) -> tuple[int, list[float]]:
        word, sums = self.run.world.agree(_SAVE_FAILED if self.saver.fault else self.stop_signal(), numbers)
        if word == _SAVE_FAILED:
            self.saver.finish()  # raises, on every rank
        return word, sums


def make_job(
    run: Run,
    built: Built,
    log: Log,
    saver: Saver,
    stop_signal: Callable[[], int],
    *,
    start: Checkpoint | None,
    owed: dict[str, Any] | None,
    validates: bool,
) -> Job:
    """The job of the steps after `start`; `owed` is that step's line where its validation was cut short."""
    settings, plan, world = run.settings, run.plan, run.world
    prompts = read_prompts(Path(settings.sample_prompts), "--sample-prompts") if settings.sample_prompts else []
    parts = Parts(run, built, log, saver, stop_signal, validates, prompts)
    return Job(
        batches=lambda first_step: _batches(run, first_step),
        schedule=Schedule(
            settings.lr_scheduler_type or "linear",
            settings.learning_rate or 0.0,
            plan.warmup_steps,
            plan.steps,
            plan.decay_steps,
        ),
        due=due(settings, plan),
        meter=Meter(
            world.device,
            plan.shape.flops_per_token(plan.block_size),
            peak_flops(world.device, run.precision.name),
        ),
        tokens_per_step=plan.tokens_per_step,
        run_seed=settings.seed,
        skips_overflow=run.precision.name == "fp16",
        skipped=start.step - int(start.read(OPTIMIZER, "updates", 0, 1)) if start is not None else 0,
        patience=patience_of(start.manifest if start is not None else {}, settings.early_stopping_patience),
        owed=owed,
        amend=lambda loss, patience: resume.amend(start, run.folder, world, {"eval_loss": loss, **patience.facts()}),
        validate=parts.validate,
        sample=parts.sample,
        save=parts.save,
        saved=parts.saved,
        agree=parts.agree,
    )


def _batches(run: Run, first_step: int) -> Iterator[list[torch.Tensor]]:
    plan, tokens = run.plan, run.store.tokens("train")
    items = sample_blocks(count_blocks(len(tokens), plan.block_size), run.settings.data_fraction, run.settings.seed)
    assert len(items) == plan.blocks
    stream = micro_batches(
        tokens,
        items,
        block_size=plan.block_size,
        micro_batch=plan.place.micro_batch,
        accumulation=plan.place.accumulation,
        rank=run.world.rank,
        ranks=run.world.size,
        run_seed=run.settings.seed,
        first_step=first_step,
    )
    return ahead(stream, run.world.device)


def due(settings: TrainSettings, plan: Plan) -> Due:
    eval_steps = settings.eval_steps or settings.save_steps
    sample_steps = (settings.sample_steps or eval_steps) if settings.sample_prompts else 0
    return Due(settings.logging_steps, eval_steps, settings.save_steps, plan.steps, sample_steps)
