"""Where stores and runs are made unless a setting names a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from wikift.settings.fields import DataSettings


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
