"""Which local files a dataset's name stands for: one file, a folder with `train.*`, or one in the Hub's layout."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wikift.base import hub
from wikift.base.errors import UserError
from wikift.base.files import sha256_of
from wikift.base.names import WIKITEXT
from wikift.data.readers import READERS

SPLITS = ("train", "validation", "test")
CHANGED = "changed while it was read; run the command again when nothing is writing to it"
_LISTED = 8

SplitFiles = dict[str, list[Path]]


@dataclass(frozen=True)
class UserFiles:
    """The files of each split, all of one kind (`suffix`)."""

    suffix: str
    config: str | None
    splits: SplitFiles
    rows_are_documents: bool

    def listed(self, *, checksums: bool) -> dict[str, list[dict[str, Any]]]:
        """Name, size and time of each split's files, and their SHA-256 where asked for."""
        return {split: [_describe(path, checksums) for path in paths] for split, paths in self.splits.items()}


def _describe(path: Path, checksum: bool) -> dict[str, Any]:
    about = path.stat()
    entry: dict[str, Any] = {"name": path.name, "bytes": about.st_size, "mtime_ns": about.st_mtime_ns}
    return {**entry, "sha256": sha256_of(path)} if checksum else entry


def user_files(dataset: str, config: str | None) -> UserFiles | None:
    """The files that `--dataset` and `--dataset-config` name, None where that is a name of the Hub.

    Reads names only (and a README.md's front matter). Raises UserError for what can't be a dataset.
    """
    path, where = Path(dataset), f"--dataset {dataset}"
    if path.is_file():
        if config is not None:
            raise UserError(f"--dataset-config {config}: has no effect, {path} is one file; omit it")
        return _of_one_kind({"train": [path]}, None, where)
    if not path.is_dir():
        _must_be_hub_name(dataset, where)
        return None
    try:
        if _lists_configs(path / "README.md"):
            return _of_readme(path, config, where)
        splits = _split_files(path)
        configs = {p.name: files for p in sorted(path.iterdir()) if p.is_dir() and (files := _split_files(p))}
        names = ", ".join(sorted(p.name for p in path.iterdir())[:_LISTED])
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror}); fix its permissions") from None
    if splits and config is not None:
        raise UserError(f"--dataset-config {config}: has no effect, {path} has no configurations; omit it")
    if not splits and configs:
        if config is None and len(configs) == 1:
            (config,) = configs
        if config not in configs:
            raise UserError(config_problem(config, list(configs)))
        return _of_one_kind(configs[config], config, where, documents=not set(configs) & set(WIKITEXT))
    if not splits:
        raise UserError(
            f"{where}: has no train, validation or test with {', '.join(READERS)} (there: {names or 'nothing'}); "
            "name the files, for example, train.txt, validation.txt, test.txt"
        )
    return _of_one_kind(splits, None, where)


def config_problem(config: str | None, names: list[str]) -> str:
    """The problem of a `--dataset-config` that is missing, or none of `names`."""
    wrong = (
        ": required, the dataset has several" if config is None else f" {config}: the dataset has no such configuration"
    )
    return f"--dataset-config{wrong}; choose one of {', '.join(names)}"


def configs_in(error: Exception) -> list[str]:
    """The configurations that `datasets` lists in its error about a wrong one; empty for other errors."""
    listed = re.search(r"(?:vailable(?: configs)?): \[(.*?)\]", str(error))
    return re.findall(r"'(.*?)'", listed[1]) if listed and type(error) is ValueError else []


def _must_be_hub_name(dataset: str, where: str) -> None:
    path = Path(dataset)
    if path.exists():
        raise UserError(f"{where}: is neither a file nor a folder; save the text in a file")
    if path.suffix.lower() in READERS or not hub.is_name(dataset):
        raise UserError(f"{where}: no such file or folder; fix the path")
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
    for parent in (folder, folder / "data"):
        named = {s: re.compile(rf"{s}(-\d+-of-\d+)?\.(txt|jsonl|parquet)", re.IGNORECASE) for s in SPLITS}
        files = sorted(parent.iterdir()) if parent.is_dir() else []
        splits = {split: [p for p in files if name.fullmatch(p.name)] for split, name in named.items()}
        if any(splits.values()):
            return {split: paths for split, paths in splits.items() if paths}
    return {}


def _lists_configs(readme: Path) -> bool:
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    return re.match(r"---\r?\n(.*\n)?configs:", text.partition("\n---")[0], re.DOTALL) is not None


def _of_readme(folder: Path, config: str | None, where: str) -> UserFiles:
    """The files of a configuration in the README's front matter, found by `datasets` and not read or copied by it."""
    import datasets

    datasets.utils.logging.set_verbosity_error()
    try:
        builder = datasets.load_dataset_builder(str(folder.resolve()), config)
    except Exception as error:  # of YAML, of its own, and ValueError for most others
        if names := configs_in(error):
            raise UserError(config_problem(config, names)) from None
        message = " ".join(str(error).split())[:300]
        raise UserError(f"{where}: README.md names files that do not exist ({message}); download it again") from None
    listed = builder.config.data_files or {}
    splits = {str(split): [Path(file) for file in files] for split, files in listed.items()}
    documents = not {*builder.builder_configs} & {*WIKITEXT}
    return _of_one_kind(splits, builder.config.name, where, documents)
