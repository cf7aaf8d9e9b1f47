"""A run and its folder: from where it goes on, whether it may, and what is written there.

OUTPUT_DIR/config.json      settings, derived numbers and the store's record, of the newest start
OUTPUT_DIR/model/           the model's config and the tokenizer, for consolidation
OUTPUT_DIR/metrics.jsonl    see log.py
OUTPUT_DIR/checkpoints/     see checkpoint.py
OUTPUT_DIR/before-1/ ...    what an earlier run left here, kept when another starts anew
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

from transformers.utils import logging as transformers_logging

from wikift import __version__
from wikift.base.errors import EnvironmentFault, UserError
from wikift.base.files import replace_json
from wikift.base.signals import stop_requests
from wikift.base.world import be_deterministic, started_world
from wikift.checkpoint.reader import Checkpoint, best_checkpoint, list_checkpoints
from wikift.checkpoint.writer import Saver
from wikift.data.store import TokenStore
from wikift.engines.build import Built, build
from wikift.engines.memory import explained, keep_freed_memory
from wikift.model.gpt2 import resolve_precision
from wikift.settings import run_plan as derive
from wikift.settings.fields import TrainSettings
from wikift.settings.run_plan import Plan
from wikift.training import resume
from wikift.training.hosts import check_hosts
from wikift.training.job import Run, due, make_job
from wikift.training.loop import run_steps
from wikift.training.resume import Say, check_same_experiment, checkpoint_to_resume, locked, set_aside
from wikift.watch.log import Log, open_log


def train_run(settings: TrainSettings, plan: Plan, store: TokenStore, say: Say) -> int:
    """Train to the end or to a stop; collective. Gives the signal that stopped it, else 0."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    folder = Path(settings.output_dir or "")
    validates = store.has_validation
    if not validates:
        say(f"{store.path} has no validation text: no validation, no best checkpoint")
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
            built = build(settings, plan, world, run.precision, store.eos_token_id, start, say)
        if world.rank == 0:
            _prepare_folder(run, built, start)
        for text in _announcement(run, built, start):
            say(text)
        done = start.step if start is not None else 0
        owed = resume.owed_line(settings, due(settings, plan), folder, start) if validates else None
        with _log(run, done - (owed is not None)) as log:
            saver = Saver(folder, world, keep=settings.save_total_limit, aside=settings.async_save)
            job = make_job(run, built, log, saver, stop_signal, start=start, owed=owed, validates=validates)
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


def _prepare_folder(run: Run, built: Built, start: Checkpoint | None) -> None:
    """Set aside what lies after `start`, then write config.json and model/."""
    about = {
        "wikift": __version__,
        "settings": dataclasses.asdict(run.settings),
        "derived": {**dataclasses.asdict(run.plan), "tokens_per_step": run.plan.tokens_per_step},
        "store": run.store.record,
        "store_path": str(run.store.path.resolve()),
    }
    folder = run.folder / "model"
    try:
        set_aside(run.folder, start)
        replace_json(run.folder / "config.json", about)  # first: by it the folder is known as a run's
        folder.mkdir(parents=True, exist_ok=True)
        built.config.save_pretrained(folder)
        built.generation_config.save_pretrained(folder)
        for file in (run.store.path / "tokenizer").iterdir():
            shutil.copyfile(file, folder / file.name)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise EnvironmentFault(f"{run.folder}: the disk is full ({error.strerror}); free space and go on") from None
        raise UserError(
            f"--output-dir {run.folder}: {error.filename} cannot be written ({error.strerror}); name a folder you may "
            "write"
        ) from None


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
