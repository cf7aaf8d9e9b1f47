"""The consolidate command: one checkpoint of a run to a Hugging Face directory; `run` is the same for Python."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from wikift.base import folders, hub
from wikift.base.command import command_line
from wikift.base.console import print
from wikift.base.conversions import third_party
from wikift.base.errors import EXIT_DONE, UserError
from wikift.base.files import parse_size, read_json
from wikift.base.launcher import launch
from wikift.base.names import EXPORT_RECORD
from wikift.checkpoint.reader import best_checkpoint
from wikift.export.export import export
from wikift.export.push import push, push_problems
from wikift.settings.checks import problems_of
from wikift.settings.options import parse_all
from wikift.settings.run_fields import ConsolidateSettings

Say = Callable[[str], None]


def main(argv: Sequence[str]) -> int:
    parsed = parse_all(ConsolidateSettings, argv)
    parsed.checked(check)
    settings = parsed.settings
    say = (lambda text: None) if settings.quiet else print
    out, data = run(settings, say), ""
    if folders.run_of(str(out)) is None:  # away from its run a model does not know its text
        store = folders.run_config(_run_folder(str(settings.run))).get("store_path", "STORE")
        data = f" --data {shlex.quote(str(store))}"
    model = shlex.quote(str(out))
    say(f"next:  {command_line('evaluate')} {model}{data}\n       {command_line('generate')} {model}")
    return EXIT_DONE


def run(settings: ConsolidateSettings, say: Say = lambda text: None) -> Path:
    """Make the directory and return it; `say` is called with what was chosen and made.

    Raises UserError for every problem of the settings and for a damaged checkpoint, EnvironmentFault where the disk is
    full or cannot be written; in both cases an earlier export still stands.
    """
    check(settings)
    source = Path(str(settings.run))
    folder = _run_folder(str(settings.run))
    checkpoint = source if folders.is_checkpoint(source) else _choose(folder, settings)
    target = Path(settings.out) if settings.out else folder / "hf"
    export(checkpoint, target, dtype=settings.dtype, shard_bytes=parse_size(settings.max_shard_size), say=say)
    if settings.push_to_hub is not None:
        message = f"{folder.absolute().name}, step {folders.step_of(checkpoint):,}"
        say(f"pushed: {push(target, settings.push_to_hub, private=settings.private, message=message)}")
    return target


def model_source(name: str, say: Say) -> str:
    """The directory or Hub name to load for `name`; a run without `hf` is exported first.

    Raises UserError where there are no trained weights.
    """
    path = Path(name)
    folders.check_model(name)
    if not path.exists():
        for files in (hub.CONFIG, hub.TOKENIZER, hub.WEIGHTS):
            hub.fetch(name, "MODEL", files)
        return name
    if folders.is_model(path):
        return name
    target = path / "hf"
    if not folders.is_model(target):
        return str(run(ConsolidateSettings(run=name), say))
    steps, record = folders.checkpoint_steps(path), read_json(target / EXPORT_RECORD)
    step, dtype = record.get("step"), record.get("dtype", "float32")
    if steps and isinstance(step, int) and step < steps[-1]:
        command = f"{command_line('consolidate')} {shlex.quote(name)}"
        command += f" --dtype {shlex.quote(str(dtype))}" if dtype != "float32" else ""
        say(f"{target} is of step {step}, the run has come to {steps[-1]}: {command}")
    return str(target)


def _run_folder(name: str) -> Path:
    return Path(name).parent.parent if folders.is_checkpoint(Path(name)) else Path(name)


def check(settings: ConsolidateSettings) -> None:
    """Raises UserError with every problem that shows without opening a checkpoint."""
    problems = []
    if launch().size > 1:
        problems.append(f"torchrun: started {launch().size} processes, this command is one; start it with python")
    problems += problems_of(lambda: parse_size(settings.max_shard_size))
    if settings.push_to_hub is not None:
        problems += push_problems(settings.push_to_hub)
    if settings.run is None:
        problems.append("RUN_OR_CHECKPOINT: is missing; name a run, runs/NAME, or one checkpoint of it")
    else:
        problems += _source_problems(Path(settings.run), settings)
    if problems:
        raise UserError(*problems)


def _source_problems(source: Path, settings: ConsolidateSettings) -> list[str]:
    if folders.is_checkpoint(source):
        if settings.step is None and not settings.best:
            return []
        setting = "--best" if settings.best else "--step"
        return [f"{setting}: has no effect, {source} is one checkpoint; name the run"]
    if not source.is_dir():
        return [f"{source}: no such folder; name a run, runs/NAME, or one checkpoint of it"]
    if (text := third_party(source)) is not None:
        return [f"{source}: {text}"]
    return problems_of(lambda: folders.run_config(source))


def _choose(folder: Path, settings: ConsolidateSettings) -> Path:
    """The run's checkpoint asked for. Raises UserError listing those it has."""
    steps = folders.checkpoint_steps(folder)
    listed = ", ".join(map(str, steps))
    if not steps:
        raise UserError(f"{folder}: has no checkpoint yet; train it further: {folders.train_command(folder)}")
    if settings.step is not None and settings.step not in steps:
        raise UserError(f"--step {settings.step}: is not among the checkpoints of {folder}: {listed}; use one of these")
    if not settings.best:
        return folders.step_folder(folder, steps[-1] if settings.step is None else settings.step)
    if (best := best_checkpoint(folder)) is None:
        raise UserError(f"--best: no checkpoint of {folder} was validated; omit it, or name a --step of {listed}")
    return best
