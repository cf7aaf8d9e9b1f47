"""What a folder holds (a model, a run, a checkpoint) and which run is the newest; known without importing torch.

RUN/config.json              the run's settings          RUN/model/         configuration and tokenizer
RUN/metrics.jsonl            one object a step           RUN/checkpoints/   step-00000500/manifest.json, ...
RUN/hf/                      the exported model, `wikift.json` in it says of which run and step
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wikift.base.command import command_line
from wikift.base.errors import UserError
from wikift.base.shape import released_name

EXPORT_RECORD = "wikift.json"
_OF_A_RUN = ("config.json", "model", "metrics.jsonl", "samples.jsonl", "checkpoints", "hf", "wandb", "store.json")


def is_model(folder: Path) -> bool:
    """Whether `folder` is a Hugging Face model directory."""
    return "model_type" in read_json(folder / "config.json")


def is_run(folder: Path) -> bool:
    """Whether `folder` is the output directory of a training, finished or not."""
    return "wikift" in read_json(folder / "config.json")


def foreign_in(folder: Path) -> list[str]:
    """What a run in `folder` would write over or be mixed with, though no run wrote it."""
    if not folder.is_dir() or is_run(folder) or checkpoint_steps(folder):
        return []
    return [name for name in _OF_A_RUN if (folder / name).exists()]


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` is one complete checkpoint of a run: its manifest is written last."""
    return folder.parent.name == "checkpoints" and (folder / "manifest.json").is_file()


def checkpoint_steps(run: Path) -> list[int]:
    """The steps of a run's complete checkpoints, oldest first."""
    names = [path.parent.name for path in run.glob("checkpoints/step-*/manifest.json")]
    return sorted(int(name[5:]) for name in names if name[5:].isdecimal())


def checkpoint_path(run: Path, step: int) -> Path:
    """The folder of one checkpoint."""
    return run / "checkpoints" / f"step-{step:08d}"


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
        made += [checkpoint_path(run, step) / "manifest.json" for step in checkpoint_steps(run)[-1:]]
        ages += [(path.stat().st_mtime_ns, run) for path in made]
    return max(ages)[1] if ages else None


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
        return is_model(path) or is_model(path / "hf") or bool(checkpoint_steps(path))
    if is_checkpoint(path):
        raise UserError(
            f"{name}: is a checkpoint; make a model of it first: {command_line('consolidate')} {name} --out DIR"
        )
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        kind = "holds neither a model nor a run" if path.is_dir() else "is a file"
        raise UserError(f"{name}: {kind}; name a Hugging Face directory, a run (runs/NAME) or a Hub name")
    return not path.exists() and is_hub_name(name)


def run_of(name: str) -> Path | None:
    """The run that `name` is, or is the model directory of (RUN/hf); None otherwise."""
    return next((path for path in (Path(name), Path(name).parent) if is_run(path)), None)


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`, empty where there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
