"""What follows from a command's settings alone: what is not set, the folders, the command that starts the run again."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wikift.base.shape import released_name
from wikift.settings.fields import DataSettings, TrainSettings
from wikift.settings.options import flag

# they start or show the run, no more
_OMITTED = ("resume", "config", "dry_run", "quiet", "wandb", "report_to", "workers")


def fallback_dataset(ranks: int) -> str:
    """What is trained on where nothing is said: the mission's data on several processes, its small twin on one."""
    return "wikitext-103-v1" if ranks > 1 else "wikitext-2-v1"


def resolve(settings: TrainSettings, ranks: int) -> TrainSettings:
    """Fill what follows from other settings alone: dataset, tokenizer, learning rate, its schedule, length, folder."""
    changes: dict[str, Any] = {}
    if settings.revision is not None and "@" not in settings.model and not Path(settings.model).is_dir():
        settings = dataclasses.replace(settings, model=f"{settings.model}@{settings.revision}", revision=None)
    if settings.data is None and settings.dataset is None:
        changes["dataset"] = (fallback_dataset(ranks),)
    if settings.data is None and settings.tokenizer is None:
        own = "@" in settings.model or not released_name(settings.model) or Path(settings.model).is_dir()
        changes["tokenizer"] = settings.model if own else "gpt2"
    if settings.learning_rate is None:
        changes["learning_rate"] = 6e-4 if settings.from_scratch else 5e-5  # nanoGPT's for 124M; run_clm.py's
    if settings.num_train_epochs is None and settings.max_steps is None:
        changes["num_train_epochs"] = 3.0
    if settings.output_dir is None:
        model = "scratch" if settings.from_scratch else slug(settings.model)
        names = (settings.data,) if settings.data else settings.dataset or changes.get("dataset", ())
        config = f"-{settings.dataset_config}" if settings.dataset_config else ""
        changes["output_dir"] = f"runs/{model}-{dataset_slug(names)}{config}"
    return dataclasses.replace(settings, **changes)


def slug(name: str) -> str:
    """The last part of a path or Hub name, fit for a folder's name."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in Path(name).name or "data").strip(".") or "data"


def dataset_slug(names: Sequence[str]) -> str:
    """Of the first of several, of a pattern's folder."""
    return slug(next((Path(name).parent.name if "*" in name else name for name in names), ""))


def store_path(settings: DataSettings) -> Path:
    """Where prepare writes the store of these (resolved) settings unless told otherwise."""
    dataset = dataset_slug(settings.dataset or ())
    parts = (dataset, settings.dataset_config, settings.dataset_revision, settings.tokenizer)
    return Path("data") / "-".join(slug(part) for part in parts if part)


def command_of(settings: TrainSettings, ranks: int) -> str:
    """The train command with these settings on `ranks` processes, defaults omitted; a shell takes it as it is."""
    options = []
    for field in dataclasses.fields(TrainSettings):
        value = getattr(settings, field.name)
        if value is None or value == field.default or field.name in _OMITTED:
            continue
        if isinstance(value, bool):
            options.append(flag(field.name) if value else flag("no_" + field.name))
        else:
            for each in value if isinstance(value, tuple) else (value,):
                options += [flag(field.name), shlex.quote(f"{each:g}" if isinstance(each, float) else str(each))]
    program = f"torchrun --nproc_per_node={ranks} -m wikift train" if ranks > 1 else "wikift train"
    return " ".join([program, *options])
