"""Which local files a dataset's name stands for: one file, a folder with `train.*`, or one in the Hub's layout."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wikift.base import hub
from wikift.base.errors import UserError
from wikift.data.readers import READERS
from wikift.settings.fields import WIKITEXT, DataSettings

SPLITS = ("train", "validation", "test")
CHANGED = "changed while it was read; run the command again when nothing writes to it"
_LISTED = 8

SplitFiles = dict[str, list[Path]]


@dataclass(frozen=True)
class UserFiles:
    """The files of each split, all of one kind (`suffix`)."""

    suffix: str
    config: str | None
    splits: SplitFiles
    rows_are_documents: bool


def user_files(settings: DataSettings) -> UserFiles | None:
    """The files that `--dataset` and `--dataset-config` name, None where that is a name of the Hub.

    Reads names only (and a README.md's front matter). Raises UserError for what can't be a dataset.
    """
    assert settings.dataset is not None
    path, config = Path(settings.dataset), settings.dataset_config
    where = f"--dataset {settings.dataset}"
    if path.is_file():
        if config is not None:
            raise UserError(f"--dataset-config {config}: cannot act, {path} is one file; leave it out")
        return _of_one_kind({"train": [path]}, None, where)
    if not path.is_dir():
        _must_be_hub_name(settings.dataset, where)
        return None
    try:
        configs, splits = _configs(path), _split_files(path)
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror}); mend its permissions") from None
    if configs is None:
        if config is not None:
            raise UserError(f"--dataset-config {config}: cannot act, {path} has no configurations; leave it out")
        if not splits:
            raise UserError(
                f"{where}: has no train, validation or test with {', '.join(READERS)} (there: {_listing(path)}); "
                "name the files train.txt, validation.txt, test.txt or the like"
            )
        return _of_one_kind(splits, None, where)
    if config is None and len(configs) == 1:
        config = next(iter(configs))
    if config is None:
        raise UserError(f"--dataset-config: must be given, {path} has several ({', '.join(configs)}); choose one")
    if config not in configs:
        raise UserError(f"--dataset-config {config}: no such configuration of {path}; it has {', '.join(configs)}")
    return _of_one_kind(configs[config], config, where, documents=not set(configs) & set(WIKITEXT))


def _must_be_hub_name(dataset: str, where: str) -> None:
    path = Path(dataset)
    if path.exists():
        raise UserError(f"{where}: is neither a file nor a folder; save the text in a file")
    if path.suffix.lower() in READERS or not hub.is_name(dataset):
        raise UserError(f"{where}: no such file or folder; mend the path")
    near = difflib.get_close_matches(dataset, (*WIKITEXT, "demo"), n=1, cutoff=0.75)
    if near and "/" not in dataset:
        raise UserError(f"{where}: no such file, folder or dataset; did you mean {near[0]}?")


def _of_one_kind(splits: SplitFiles, config: str | None, where: str, documents: bool = True) -> UserFiles:
    suffixes = sorted({file.suffix.lower() for files in splits.values() for file in files})
    wrong = [suffix or "files without an ending" for suffix in suffixes if suffix not in READERS]
    if wrong:
        raise UserError(f"{where}: wikift reads {', '.join(READERS)}, not {', '.join(wrong)}; convert the text to one")
    if len(suffixes) > 1:
        raise UserError(f"{where}: mixes {' and '.join(suffixes)}; keep one kind of file for all splits")
    return UserFiles(suffixes[0], config, splits, documents and suffixes[0] != ".txt")


def _split_files(folder: Path) -> SplitFiles:
    """`train.*` or the Hub's `train-00000-of-00002.*`, in the folder or in its `data`."""
    for place in (folder, folder / "data"):
        splits = {}
        for split in SPLITS:
            named = re.compile(rf"{split}(-\d+-of-\d+)?\.(txt|jsonl|parquet)", re.IGNORECASE)
            found = sorted(p for p in place.iterdir() if named.fullmatch(p.name)) if place.is_dir() else []
            if found:
                splits[split] = found
        if splits:
            return splits
    return {}


def _listing(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir())
    return ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "") or "nothing"


# --- the Hub's layout --------------------------------------------------------------------------------------------


def _configs(folder: Path) -> dict[str, SplitFiles] | None:
    """The configurations that the README's front matter lists, else the subfolders with splits; None without any."""
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    front = re.match(r"---\r?\n(.*?)\r?\n---\s*(\n|$)", text, re.DOTALL)
    listed = _front_matter(front[1], readme).get("configs") if front else None
    if listed:
        try:
            return {str(entry["config_name"]): _data_files(folder, entry["data_files"]) for entry in listed}
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{readme}: its configs lack config_name or data_files; copy the dataset again") from None
    if _split_files(folder):
        return None
    return {p.name: found for p in sorted(folder.iterdir()) if p.is_dir() and (found := _split_files(p))} or None


def _front_matter(text: str, readme: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{readme}: its front matter is not YAML ({hub.one_line(error)}); mend it") from None
    return content if isinstance(content, dict) else {}


def _data_files(folder: Path, listed: Any) -> SplitFiles:
    """`data_files` of a README: a pattern, patterns, or a list of splits with theirs."""
    if isinstance(listed, str) or all(isinstance(entry, str) for entry in listed):
        listed = [{"split": "train", "path": listed}]
    splits: SplitFiles = {}
    for entry in listed:
        patterns = [entry["path"]] if isinstance(entry["path"], str) else entry["path"]
        files = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
        if not files:
            raise UserError(f"{folder}: README.md names {', '.join(patterns)}, which is not there; copy it again")
        splits[str(entry["split"])] = files
    return splits
