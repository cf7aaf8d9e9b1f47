"""What a folder holds (a model, a run, a checkpoint) and which run is the newest; known without importing torch.

RUN/config.json      the run's settings            RUN/model/         configuration and tokenizer
RUN/metrics.jsonl    one object per logged step    RUN/checkpoints/   step-00000500/manifest.json, ...
RUN/samples.jsonl    what the model wrote          RUN/hf/            the exported model; its wikift.json names the step
RUN/evaluations.jsonl  scores by wikift evaluate   RUN/report.html    by wikift report
RUN/wandb-id.txt     the Weights & Biases run      RUN/before-1/ ...  an earlier run's files, kept when another started
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from wikift.base.command import as_typed, command_line
from wikift.base.errors import UserError, nearest
from wikift.base.files import read_json
from wikift.base.model_files import open_model
from wikift.base.shape import RELEASED, released_name

METRICS, SAMPLES, WANDB_ID, STACKS = "metrics.jsonl", "samples.jsonl", "wandb-id.txt", "stacks"
EVALUATIONS, REPORT, TENSORBOARD = "evaluations.jsonl", "report.html", "tensorboard"
RUN_FILES = ("checkpoints", "model", METRICS, SAMPLES, EVALUATIONS, REPORT, TENSORBOARD, WANDB_ID, "hf", "config.json")


def is_model(folder: Path) -> bool:
    return "model_type" in read_json(folder / "config.json")


def is_run(folder: Path) -> bool:
    return "wikift" in read_json(folder / "config.json")


def foreign_in(folder: Path) -> list[str]:
    """What a run in `folder` would write over or be mixed with, though no run wrote it."""
    if not folder.is_dir() or is_run(folder) or list_checkpoints(folder):
        return []
    return [name for name in (*RUN_FILES, "wandb", "store.json") if (folder / name).exists()]


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` is one complete checkpoint of a run: its manifest is written last."""
    return folder.parent.name == "checkpoints" and (folder / "manifest.json").is_file()


def step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def aside_of(checkpoint: Path) -> Path:
    """The folder in which a checkpoint is written, and deleted: what a kill leaves of it is no checkpoint."""
    return checkpoint.with_name(f".{checkpoint.name}.partial")


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def list_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    paths = [path.parent for path in (run / "checkpoints").glob("step-*/manifest.json")]
    return sorted((path for path in paths if re.fullmatch(r"step-[0-9]{8,}", path.name)), key=step_of)


def checkpoint_steps(run: Path) -> list[int]:
    return [step_of(path) for path in list_checkpoints(run)]


def run_config(run: Path) -> dict[str, Any]:
    """A run's `config.json`. Raises UserError where `run` is not a run's folder."""
    config = read_json(run / "config.json")
    if "wikift" not in config:
        raise UserError(
            f"{run}: is not a run's folder (no config.json of {command_line('train')} in it); name one, runs/NAME"
        )
    return config


def newest_run(folder: Path = Path("runs")) -> Path | None:
    """The run in `folder` whose model or newest checkpoint is the youngest; None where none has either."""
    ages = []
    for run in folder.glob("*"):
        made = [run / "hf" / "config.json"] if is_model(run / "hf") else []
        made += [path / "manifest.json" for path in list_checkpoints(run)[-1:]]
        ages += [(path.stat().st_mtime_ns, run) for path in made]
    return max(ages)[1] if ages else None


def train_command(run: Path) -> str:
    """The command that trains the run `run`, or makes it: its own where it has begun."""
    try:  # somebody else's run may record anything
        recorded = shlex.join(shlex.split(str(read_json(run / "config.json").get("command"))))
    except ValueError:
        recorded = ""
    own = re.match(r"(torchrun --nproc_per_node=\d+ -m )?wikift train\b", recorded)
    return as_typed(recorded if own else f"wikift train --output-dir {shlex.quote(str(run))}")


def is_hub_name(name: str) -> bool:
    """Whether `name`, which is no folder here, can only mean a model of the Hub: gpt2, or OWNER/NAME."""
    owner, slash, rest = name.partition("/")
    plain = bool(owner and slash and rest) and "/" not in rest and not owner.startswith((".", "~"))
    return released_name(name) is not None or (plain and owner != "runs" and not Path(owner).exists())


def has_model(name: str) -> bool:
    """Whether `name` leads to trained weights: a model directory, a Hub name, or a run that has some.

    Raises UserError where `name` is something that can never become a model: a file, a foreign folder, a checkpoint.
    """
    path = Path(name)
    if is_model(path) or is_run(path):
        return is_model(path) or is_model(path / "hf") or bool(list_checkpoints(path))
    if is_checkpoint(path):
        command = f"{command_line('consolidate')} {shlex.quote(name)} --out DIR"
        raise UserError(f"{name}: is a checkpoint; make a model of it first: {command}")
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        open_model(name, "MODEL")  # raises, with what there is instead
    return not path.exists() and is_hub_name(name)


def check_model(name: str) -> None:
    """Raises UserError where `name` leads to no trained weights that can be read, with the command that helps."""
    path = Path(name)
    if has_model(name):
        if is_model(path):
            open_model(name, "MODEL")
        return
    if path.name == "hf" and checkpoint_steps(path.parent):
        raise UserError(
            f"{name}: is not there yet; make it: {command_line('consolidate')} {shlex.quote(str(path.parent))}"
        )
    run = path.parent if path.name == "hf" else path
    train = f"train it first: {train_command(run)}"
    if is_run(path):
        raise UserError(f"{name}: has no checkpoint yet; {train}")
    near = nearest(name, [*RELEASED, *(str(run) for run in Path("runs").glob("*") if run.is_dir())])
    raise UserError(f"{name}: no such folder, and no name of the Hub{near or '; ' + train}")


def run_of(name: str) -> Path | None:
    """The run that `name` is, or is the model directory of (RUN/hf); None otherwise."""
    return next((path for path in (Path(name), Path(name).parent) if is_run(path)), None)
