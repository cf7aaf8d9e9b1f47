"""A run and its folder: where it resumes, whether it may, and what is written there.

OUTPUT_DIR/config.json      settings, derived numbers and the store's record, of the newest start
OUTPUT_DIR/model/           the model's config and the tokenizer, for consolidation
OUTPUT_DIR/metrics.jsonl    see watch/
OUTPUT_DIR/checkpoints/     see checkpoint/
OUTPUT_DIR/before-1/ ...    what an earlier run left here, kept when another one starts
"""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, GPT2Config

from wikift import __version__
from wikift.base import hub
from wikift.base.command import command_line
from wikift.base.errors import EnvironmentFault
from wikift.base.failure import started_world
from wikift.base.files import faults_of_writing, read_json, replace_json, sums
from wikift.base.folders import list_checkpoints
from wikift.base.names import EXPORT_RECORD
from wikift.base.publish import publish_folder
from wikift.base.signals import stop_requests
from wikift.base.work import Choice
from wikift.base.world import World, be_deterministic
from wikift.checkpoint.fragment import FragmentReader, FreshStart
from wikift.checkpoint.reader import Checkpoint, best_checkpoint
from wikift.checkpoint.writer import Saver
from wikift.data.store import TokenStore
from wikift.engines.build import build_engine, choose
from wikift.engines.memory import explained, keep_freed_memory, machine_of, memory_line, training_bytes
from wikift.model.gpt2 import Precision, load_config, load_generation_config, model_config, resolve_precision, shapes_of
from wikift.model.initial_weights import random_weights, trained_weights
from wikift.settings.run_plan import RunPlan
from wikift.training import resume
from wikift.training.hosts import check_hosts, environment
from wikift.training.loop import run_steps
from wikift.training.meter import Meter, few_tokens, memory_gb, peak_flops
from wikift.training.nonfinite import Diverged, rewound
from wikift.training.resume import Say
from wikift.training.training import Training
from wikift.watch.hang import Pulse, signs_of_life
from wikift.watch.metrics import Log, open_log
from wikift.watch.profile import Profiler
from wikift.watch.terminal import phase


def train_run(plan: RunPlan, store: TokenStore, say: Say) -> int:
    """Train to the end or to a stop; collective. Returns the signal that stopped it, else 0."""
    folder = plan.output_dir
    if not store.has_validation:
        say(f"{store.path} has no validation text: no validation, no best checkpoint")
    with (
        started(plan) as (world, stop_signal),
        resume.locked(folder, world, say),
        signs_of_life(check_hosts(folder, store, world), world.rank, world.size, plan.hang_timeout) as pulse,
    ):
        world = dataclasses.replace(world, passed=pulse.mark)
        start = resume.checkpoint_to_resume(plan, world)
        owed = resume.owed_line(plan, store, start)
        resume.count_deaths(folder, world, (start.step if start else 0) - (owed is not None))
        if start is not None and (finished := resume.check_resumable(plan, store, start, say)) and owed is None:
            say(f"{folder} is finished, step {start.step:,}; {finished}")
            return 0
        training, compiled = prepare(plan, store, world, start, stop_signal, say)
        if world.rank == 0:
            seen = environment(world.device, training.plan.work.precision, compiled)
            _prepare_folder(training.plan, store, training.config, start, seen)
        stopped, rewinds = None, list[dict[str, Any]]()
        while stopped is None:
            try:
                stopped = _train(training, owed, pulse, rewinds[-1:])
            except Diverged as diverged:
                times = sum(event["step"] == training.done for event in rewinds)
                training, event = rewound(training, diverged, times)
                rewinds, owed = [*rewinds, event], None
    if not stopped:
        best, newest = best_checkpoint(folder), list_checkpoints(folder)[-1]
        choice = "" if best in (None, newest) else " --best"
        consolidate, generate, quoted = command_line("consolidate"), command_line("generate"), shlex.quote(str(folder))
        say(f"done: {folder}\n  {consolidate} {quoted}{choice}\n  {generate} {quoted}")
    return stopped


def _train(training: Training, owed: dict[str, Any] | None, pulse: Pulse, events: list[dict[str, Any]]) -> int:
    """Train, with a log of its own that begins with `events`. Returns the signal that stopped it, else 0."""
    plan, world, folder = training.plan, training.world, training.plan.output_dir
    with resume.watched(folder, world, training.stop_signal) as stop_signal, open_log(
        folder, after_step=training.done - (owed is not None), steps=plan.steps, epochs=plan.epochs,
        quiet=plan.quiet, trackers=plan.trackers, rank=world.rank,
    ) as log:  # fmt: skip
        log.pulse = pulse
        for event in events:
            log.event(event)
        training = dataclasses.replace(training, log=log, stop_signal=stop_signal)
        with explained(plan.work, world):
            steps = 0 if world.rank else plan.settings["profile"] or 0
            profiler = Profiler(folder, steps, world.device.type == "cuda", log.say)
            stopped = run_steps(training, owed, profiler)
            profiler.finish()
        training.saver.finish()
        log.tick(**training.saved())
        log.say(training.memory())
        if stopped or training.stopped() == resume.FOLDER_GONE:
            log.say(_end(folder, stopped))
    return stopped


@contextlib.contextmanager
def started(plan: RunPlan) -> Iterator[tuple[World, Callable[[], int]]]:
    """The ranks of a run, and the signal that asks it to stop; transformers is quiet inside."""
    hub.quiet_libraries()
    if plan.deterministic:
        be_deterministic()  # before NCCL starts, which would take sums in NVLink's switches otherwise
    seconds = plan.hang_timeout + 60  # `signs_of_life` is first, and says more
    with started_world(plan.device, seconds) as world, stop_requests() as stop_signal:
        yield world, stop_signal


def prepare(
    plan: RunPlan, store: TokenStore, world: World, start: Checkpoint | None, stop_signal: Callable[[], int], say: Say
) -> tuple[Training, str]:
    """Choose and build all that trains, in memory alone, with a silent log; and whether it is compiled. Collective."""
    precision = resolve_precision(plan.work.precision, world.device)
    machine, before = machine_of(world), memory_gb(world.device)
    chosen = choose(plan.in_precision(precision.name), machine, resume.earlier_choice(start, world.size))
    plan = dataclasses.replace(plan, work=chosen)
    work = plan.in_precision(precision.name)  # its micro-batch is in DeepSpeed's configuration too
    plan = dataclasses.replace(plan, work=work)
    if world.device.type == "cpu" and work.engine.name in ("single", "ddp"):  # others would keep half as much again
        keep_freed_memory()
    with phase(f"loading the {'checkpoint' if start else 'model'}", say):
        config, reader = _start(plan, _config(plan, store, start), start, say)
    with explained(work, world), phase("building the engine", say):
        engine, compiled = build_engine(work, config, reader, world)
    for text in _announcement(plan, world, compiled, precision, start):
        say(text)
    say(memory_line(work, machine))
    tokens = store.splits["validation"].tokens if store.has_validation else 0
    tokens = min(tokens, plan.eval_blocks * plan.block_size or tokens)
    peak = peak_flops(world.device, precision.name)
    flops = plan.model.shape.flops_per_token(plan.block_size)
    meter = Meter(world.device, flops, peak, eval_tokens=tokens, ranks=world.size)
    training = Training(
        plan, store, world, config, shapes_of(config), engine, Log(),
        Saver(plan.output_dir, world, keep=plan.save_total_limit, aside=work.save_aside), meter, stop_signal, start,
        before, training_bytes(work, world.size, gpu=machine.gpu), start.manifest.get("left_out", 0) if start else 0,
    )  # fmt: skip
    return training, compiled.name


def _end(folder: Path, stopped: int) -> str:
    """What to say of a run that `stopped`, a signal, has ended. Raises EnvironmentFault where its folder has gone."""
    saved = list_checkpoints(folder)
    if stopped not in set(signal.Signals):
        kept = f"its state is saved there anew, {saved[-1].name}; the same command resumes from it" if saved else ""
        raise EnvironmentFault(
            f"{folder} was deleted or moved while the run was writing to it; {kept or 'move it back, or start again'}"
        )
    end = "and saved; the same command resumes from here" if saved else "in the first step; nothing is saved"
    return f"stopped by {signal.Signals(stopped).name} {end}"


def _config(plan: RunPlan, store: TokenStore, start: Checkpoint | None) -> GPT2Config:
    """The configuration of the model to train: the checkpoint's, a new one, or the trained model's."""
    values: dict[str, Any]
    if start is not None:
        values = start.manifest["model_config"]
    elif plan.model.from_scratch:
        values = dataclasses.asdict(plan.model.shape)
        values |= {"bos_token_id": store.eos_token_id, "eos_token_id": store.eos_token_id}
    else:
        values = load_config(plan.model.name).to_dict()
    return model_config({**values, **plan.model.changes})


def _start(plan: RunPlan, config: GPT2Config, start: Checkpoint | None, say: Say) -> tuple[GPT2Config, FragmentReader]:
    """What the engine starts from, the checkpoint, random weights or a trained model's; and their configuration."""
    if start is not None:
        return config, start
    if plan.model.from_scratch:
        return config, FreshStart(random_weights(config, shapes_of(config), plan.seed))
    config, weight = trained_weights(plan.model.name, config, "--model", say)
    return config, FreshStart(weight)


def _prepare_folder(
    plan: RunPlan, store: TokenStore, config: GPT2Config, start: Checkpoint | None, environment: dict[str, Any]
) -> None:
    """Set aside what was written after `start`, then write config.json and model/."""
    earlier = read_json(plan.output_dir / "config.json").get("commits", {}) if start is not None else {}
    about = {
        "wikift": __version__,
        "command": plan.command,
        "settings": plan.settings,
        "derived": plan.record(),
        "environment": environment | {"engine": plan.work.engine.name, "ranks": plan.ranks},
        "commits": {**earlier, **hub.commits},
        "store": store.record,
        "store_path": str(store.path.resolve()),
    }
    scratch = plan.model.from_scratch or start is not None
    generation = (
        GenerationConfig.from_model_config(config) if scratch else load_generation_config(plan.model.name, config)
    )
    folder = plan.output_dir / "model"
    with faults_of_writing(plan.output_dir):
        resume.set_aside(plan.output_dir, start)
        replace_json(plan.output_dir / "config.json", about)  # first: by it the folder is known as a run's
        if start is None or not folder.is_dir():
            with publish_folder(folder, replace=True) as partial:
                config.save_pretrained(partial)
                generation.save_pretrained(partial)
                for file in (store.path / "tokenizer").iterdir():
                    shutil.copyfile(file, partial / file.name)
                replace_json(partial / EXPORT_RECORD, {"files": sums(partial)})


def _announcement(
    plan: RunPlan, world: World, compiled: Choice, precision: Precision, start: Checkpoint | None
) -> Iterator[str]:
    summary = plan.summary
    scratch = " from scratch" if plan.model.from_scratch else ""
    yield f"{plan.model.name}{scratch}: {summary['parameters']} parameters; {summary['train blocks']}"
    yield f"engine {plan.work.engine.name} ({plan.work.engine.reason}), {compiled.name} ({compiled.reason})"
    yield f"{precision.name} on {world.device.type} ({precision.reason})"
    if precision.warning:
        yield f"warning: {precision.warning}"
    yield f"{plan.layout.words} = {summary['tokens per step']} tokens; {summary['steps']}"
    if world.device.type == "cuda" and world.size > 1:
        tokens, reduced = plan.tokens_per_step // world.size, 4 if plan.work.reduce_dtype == "fp32" else 2
        yield from few_tokens(tokens, plan.model.shape, plan.block_size, reduced)
    if start is not None:
        yield f"resuming from {start.path}, after step {start.step:,}"
