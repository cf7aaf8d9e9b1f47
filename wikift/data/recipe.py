"""What a token store was made of, and whether settings ask for the same.

A recipe is the dataset with its configuration, the content of the user's files, the text column, the cut, the tokenizer
and the end-of-text token. It is compared without reading text, loading a tokenizer or asking the Hub, save that files
with other times and the same size are read to compare their checksums.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from wikift.base.command import command_line
from wikift.base.errors import UserError
from wikift.base.files import sha256_of
from wikift.data.sources import DEFAULT_VALIDATION_FRACTION, Corpus, idle_fraction
from wikift.data.store import TokenStore
from wikift.data.tokenizer import SavedTokenizer, tokenizer_fingerprint
from wikift.data.user_files import CHANGED, user_files
from wikift.settings.fields import WIKITEXT, DataSettings

FileList = dict[str, list[dict[str, Any]]]


def source_of(settings: DataSettings, *, checksums: bool) -> dict[str, Any]:
    """What identifies the text, as far as settings and files tell; `files` only where they are the user's own."""
    dataset, config, column = settings.dataset, settings.dataset_config, settings.text_column
    assert dataset is not None
    if dataset == "demo":
        return {"dataset": dataset, "dataset_config": None, "text_column": None}
    files = None if dataset in WIKITEXT else user_files(settings)
    if files is None:
        config = dataset if dataset in WIKITEXT else config
        return {"dataset": dataset, "dataset_config": config, "text_column": column}
    listed: FileList = {split: [_describe(p, checksums) for p in paths] for split, paths in files.splits.items()}
    return {
        "dataset": Path(dataset).resolve().name,
        "dataset_config": files.config,
        "text_column": None if files.suffix == ".txt" else column,
        "files": listed,
    }


def _describe(path: Path, checksum: bool) -> dict[str, Any]:
    about = path.stat()
    entry: dict[str, Any] = {"name": path.name, "bytes": about.st_size, "mtime_ns": about.st_mtime_ns}
    return {**entry, "sha256": sha256_of(path)} if checksum else entry


def record_of(
    source: dict[str, Any], corpus: Corpus, tokenizer: SavedTokenizer, append_eos: bool, dataset: str
) -> dict[str, Any]:
    """The part of `store.json` that says what was done; `dataset` is as the user named it."""
    files: FileList = source.get("files", {})
    path = str(Path(dataset).resolve())  # where evaluation finds the text again; no part of the recipe
    content = [f"{split} {entry['sha256']}" for split, entries in files.items() for entry in entries]
    revision = "sha256:" + hashlib.sha256("\n".join(content).encode()).hexdigest() if files else corpus.revision
    return {
        **{key: value for key, value in source.items() if key != "files"},
        "dataset_name": corpus.name,
        "revision": revision,
        "rows_are_documents": corpus.rows_are_documents,
        "append_eos": append_eos,
        "newlines": "each row ends with its own, CRLF read as LF" if corpus.rows_are_lines else "as in the rows",
        **(corpus.cut or {"validation_fraction": None, "seed": None}),
        "tokenizer": {"name": tokenizer.name},
        **({"files": files, "dataset_path": path} if files else {}),
    }


def check_recipe(store: TokenStore, settings: DataSettings, seed: int) -> None:
    """Raise UserError where `store` was made otherwise than the (resolved) settings ask."""
    record, different = store.record, []

    def compare(name: str, there: Any, asked: Any) -> None:
        if there != asked:
            different.append(f"{name} {_show(there)} there, {_show(asked)} asked")

    source = source_of(settings, checksums=False)
    for name in ("dataset", "dataset_config", "text_column"):
        compare(name, record.get(name), source[name])
    if not different and "files" in source and not _same_files(record.get("files") or {}, source["files"], settings):
        different.append("the files' content is another now")
    eos = record.get("rows_are_documents") if settings.append_eos is None else settings.append_eos
    compare("append_eos", record.get("append_eos"), eos)
    if record.get("validation_fraction") is not None:
        fraction = settings.validation_fraction
        asked = DEFAULT_VALIDATION_FRACTION if fraction is None else fraction
        compare("validation_fraction", record["validation_fraction"], asked)
        compare("seed", record.get("seed"), seed)
    elif settings.validation_fraction is not None and not different and "validation" in store.splits:
        raise UserError(idle_fraction(settings, True))
    name = settings.tokenizer or ""
    if not name.startswith("train:") and Path(name).is_dir():
        if tokenizer_fingerprint(name) != store.tokenizer_fingerprint:
            different.append(f"tokenizer {record['tokenizer'].get('name')} there, that of {name} is another")
    else:
        compare("tokenizer", record["tokenizer"].get("name"), name)
    if different:
        raise UserError(
            f"{store.path}: is a store made otherwise ({'; '.join(different)}); remove that folder, "
            f"or make another store with {command_line('prepare')} --out DIR"
        )


def check_unchanged(store: TokenStore, settings: DataSettings, seed: int) -> None:
    """Raises UserError where the text of this `store`, just made, is another by now."""
    try:
        check_recipe(store, settings, seed)
    except UserError:
        raise UserError(f"{settings.dataset}: {CHANGED}") from None


def _same_files(there: FileList, now: FileList, settings: DataSettings) -> bool:
    """Files of the same sizes and times are the same; of the same sizes only, if their checksums are."""

    def only(listed: FileList, *keys: str) -> dict[str, list[list[Any]]]:
        return {split: [[file.get(key) for key in keys] for file in files] for split, files in listed.items()}

    if only(there, "bytes") != only(now, "bytes"):
        return False
    if only(there, "mtime_ns") == only(now, "mtime_ns"):
        return True
    return only(there, "sha256") == only(source_of(settings, checksums=True)["files"], "sha256")


def _show(value: Any) -> str:
    return "none" if value is None else str(value)
