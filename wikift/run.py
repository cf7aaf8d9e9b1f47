"""A run and its folder: from where it goes on, whether it may, and the parts that the loop is given.

OUTPUT_DIR/config.json      settings, derived numbers and the store's record, of the newest start
OUTPUT_DIR/model/           the model's config and the tokenizer, for consolidation
OUTPUT_DIR/metrics.jsonl    see log.py
OUTPUT_DIR/checkpoints/     see checkpoint.py
OUTPUT_DIR/before-1/ ...    what an earlier run left here, kept when another starts anew
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from wikift import __version__, derive, resume
from wikift.batches import ahead, count_blocks, micro_batches, sample_blocks
from wikift.build import Built, build
from wikift.checkpoint import Checkpoint, best_checkpoint, list_checkpoints
from wikift.choose import Sampling
from wikift.cli import flag
from wikift.config import TrainSettings
from wikift.derive import Plan
from wikift.disk import replace_json
from wikift.engines.base import OPTIMIZER
from wikift.errors import UserError
from wikift.hosts import check_hosts
from wikift.interrupt import stop_requests
from wikift.live import sample_live
from wikift.log import Log, open_log
from wikift.loop import Due, Job, run_steps
from wikift.memory import explained, keep_freed_memory
from wikift.meter import Meter, peak_flops
from wikift.model import Precision, resolve_precision
from wikift.optim import Schedule
from wikift.patience import Patience, patience_of
from wikift.prompts import read_prompts
from wikift.resume import Say, check_same_experiment, checkpoint_to_resume, experiment, locked, set_aside
from wikift.saving import Saver
from wikift.scoring import Score, score_split
from wikift.tokens import TokenStore
from wikift.world import World, be_deterministic, started_world


@dataclass(frozen=True)
class Run:
    """What every part of a run is made from."""

    folder: Path
    settings: TrainSettings
    plan: Plan
    store: TokenStore
    world: World
    precision: Precision


def train_run(settings: TrainSettings, plan: Plan, store: TokenStore, say: Say) -> int:
    """Train to the end or to a stop; collective. Gives the signal that stopped it, else 0."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    folder = Path(settings.output_dir or "")
    validates = _validates(settings, store, say)
    if settings.deterministic:
        be_deterministic()  # before NCCL starts, which would take sums in NVLink's switches otherwise
    with started_world(settings.device) as world, stop_requests() as stop_signal, locked(folder, world, say):
        run = Run(folder, settings, plan, store, world, resolve_precision(settings.precision, world.device))
        check_hosts(folder, store, world)
        start = checkpoint_to_resume(settings, folder, world)
        if start is not None:
            check_same_experiment(settings, plan, store, start, say)
            if finished := resume.why_finished(settings, plan, start):
                say(f"{folder} is finished, step {start.step:,}; {finished}")
                return 0
        if world.device.type == "cpu":
            keep_freed_memory()
        with explained(world.device):
            built = build(settings, plan, world, run.precision, store.eos_token_id, start)
        if world.rank == 0:
            _prepare_folder(run, built, start)
        for text in _announcement(run, built, start):
            say(text)
        done = start.step if start is not None else 0
        owed = resume.owed_line(settings, _due(settings, plan), folder, start) if validates else None
        with _log(run, done - (owed is not None)) as log:
            saver = Saver(folder, world, keep=settings.save_total_limit, aside=settings.async_save)
            job = _job(run, built, log, start, owed, validates, saver, stop_signal)
            with explained(world.device):
                stopped = run_steps(built.engine, job, world, log, done=done)
            saver.finish()
            if stopped:
                log.say(f"stopped by {signal.Signals(stopped).name} and saved; the same command goes on from here")
    if not stopped:
        best, newest = best_checkpoint(folder), list_checkpoints(folder)[-1]
        choice = "" if best in (None, newest) else " --best"
        say(f"done: {folder}\n  python launch/consolidate.py {folder}{choice}\n  python launch/generate.py {folder}")
    return stopped


_SAMPLE_TOKENS = 64
_SAVE_FAILED = 1 << 16  # above every signal's number


class _CutShort(Exception):
    """A stop was asked for while validating."""


def _job(
    run: Run,
    built: Built,
    log: Log,
    start: Checkpoint | None,
    owed: dict[str, Any] | None,
    validates: bool,
    saver: Saver,
    stop_signal: Callable[[], int],
) -> Job:
    """The functions and numbers that the loop works with."""
    settings, plan, store, world, engine = run.settings, run.plan, run.store, run.world, built.engine
    about = {
        "settings": dataclasses.asdict(settings),
        "experiment": experiment(settings, plan, store),
        "model_config": json.loads(built.config.to_json_string(use_diff=False)),
    }
    shapes = {name: list(shape) for name, shape in built.shapes.items()}

    def validate() -> Score | None:
        if not validates:
            return None

        def progress(done: int, of: int) -> None:
            log.tick(now=f"validating {done:,}/{of:,}")
            if stopped():
                raise _CutShort  # torchrun waits 30 s after a signal, a validation on CPU may take minutes

        with engine.averaged():
            try:
                return score_split(
                    engine.nll, store, "validation", context=plan.block_size, stride=plan.block_size,
                    batch=settings.per_device_eval_batch_size, world=world, progress=progress,
                )  # fmt: skip
            except _CutShort:
                log.say("the validation is cut short")
                return None
            finally:
                log.tick(now=None)

    prompts = read_prompts(Path(settings.sample_prompts), "--sample-prompts") if settings.sample_prompts else []

    def sample(step: int) -> None:
        log.tick(now="writing samples")
        with engine.averaged():
            texts = sample_live(
                engine.next_logits, AutoTokenizer.from_pretrained(store.path / "tokenizer"), prompts,
                sampling=Sampling(0.8, 50, 0.95, 1.1), max_new_tokens=_SAMPLE_TOKENS, seed=settings.seed,
                positions=plan.shape.n_positions,
            )  # fmt: skip
        log.samples(step, prompts, texts)
        log.tick(now=None)

    def save(step: int, eval_loss: float | None, patience: Patience) -> None:
        log.tick(now="saving")
        about_step = {"tokens": step * plan.tokens_per_step, "eval_loss": eval_loss, **patience.facts(), **about}
        saver.save(engine.fragments(), step, about_step, shapes)
        log.tick(now=None)
        if patience.spent:
            log.say(
                f"stopped early at step {step:,}: {patience.worse} validations in a row were no better than "
                f"{patience.best:.4f}"
            )

    def saved() -> dict[str, Any]:
        found = saver.take_saved()
        if found is None:
            return {}
        log.tick(saved=found.path.name)
        step = int(found.path.name.removeprefix("step-"))
        return {"saved_step": step, "save_stall_seconds": found.stall_seconds, "save_seconds": found.seconds}

    def agree(numbers: Sequence[float]) -> tuple[int, list[float]]:
        word, sums = world.agree(_SAVE_FAILED if saver.fault else stop_signal(), numbers)
        if word == _SAVE_FAILED:
            saver.finish()  # raises, on every rank
        return word, sums

    def stopped() -> int:
        return agree(())[0]

    return Job(
        batches=lambda first_step: _batches(run, first_step),
        schedule=Schedule(
            settings.lr_scheduler_type or "linear",
            settings.learning_rate or 0.0,
            plan.warmup_steps,
            plan.steps,
            plan.decay_steps,
        ),
        due=_due(settings, plan),
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
        validate=validate,
        sample=sample,
        save=save,
        saved=saved,
        agree=agree,
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


def _validates(settings: TrainSettings, store: TokenStore, say: Say) -> bool:
    """Whether there is something to validate on. Raises UserError where it was asked for and there is not."""
    split = store.splits.get("validation")
    if split is not None and split.tokens > 1:
        return True
    asked = {name: getattr(settings, name) for name in ("eval_steps", "early_stopping_patience")}
    if problems := [
        f"{flag(name)} {value}: cannot act, {store.path} has no validation text; prepare with --validation-fraction, "
        "or leave it out"
        for name, value in asked.items()
        if value is not None
    ]:
        raise UserError(*problems)
    say(f"{store.path} has no validation text: no validation, no best checkpoint")
    return False


def _due(settings: TrainSettings, plan: Plan) -> Due:
    eval_steps = settings.eval_steps or settings.save_steps
    sample_steps = (settings.sample_steps or eval_steps) if settings.sample_prompts else 0
    return Due(settings.logging_steps, eval_steps, settings.save_steps, plan.steps, sample_steps)


def _prepare_folder(run: Run, built: Built, start: Checkpoint | None) -> None:
    """Set aside what lies after `start`, then write config.json and model/."""
    set_aside(run.folder, start)
    folder = run.folder / "model"
    folder.mkdir(parents=True, exist_ok=True)
    built.config.save_pretrained(folder)
    built.generation_config.save_pretrained(folder)
    for file in (run.store.path / "tokenizer").iterdir():
        shutil.copyfile(file, folder / file.name)
    about = {
        "wikift": __version__,
        "settings": dataclasses.asdict(run.settings),
        "derived": {**dataclasses.asdict(run.plan), "tokens_per_step": run.plan.tokens_per_step},
        "store": run.store.record,
        "store_path": str(run.store.path.resolve()),
    }
    replace_json(run.folder / "config.json", about)


@contextlib.contextmanager
def _log(run: Run, done: int) -> Iterator[Log]:
    """The run's log on rank 0, a silent one on the others."""
    if run.world.rank != 0:
        yield Log()
        return
    words = dataclasses.asdict(run.settings)
    settings = run.settings
    with open_log(
        run.folder, after_step=done, steps=run.plan.steps, quiet=settings.quiet, wandb=settings.wandb, settings=words
    ) as log:
        yield log


def _announcement(run: Run, built: Built, start: Checkpoint | None) -> Iterator[str]:
    words = derive.plan_words(run.plan)
    scratch = " from scratch" if run.settings.from_scratch else ""
    yield f"{run.settings.model}{scratch}: {words['parameters']} parameters; {words['train blocks']}"
    yield f"engine {built.choice.name} ({built.choice.reason}), {built.compiled.name} ({built.compiled.reason})"
    yield f"{run.precision.name} on {run.world.device.type} ({run.precision.reason})"
    if run.precision.warning:
        yield f"warning: {run.precision.warning}"
    yield f"{run.plan.place.words} = {words['tokens per step']} tokens; {words['steps']}"
    if start is not None:
        yield f"going on from {start.path}, after step {start.step:,}"
