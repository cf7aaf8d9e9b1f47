"""What a token store was made of, and whether it is what is asked for.

Recipes are compared without reading text, loading a tokenizer or asking the Hub, save that files of the user's with
other times and the same sizes are read to compare their checksums.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from wikift.base import hub
from wikift.base.command import command_line
from wikift.base.errors import UserError
from wikift.base.names import CUT_SEED, WIKITEXT
from wikift.data.corpus import Corpus
from wikift.data.sources import DEFAULT_VALIDATION_FRACTION, Source, open_source, source_problems, unused_fraction
from wikift.data.store import TokenStore
from wikift.data.tokenizer import SavedTokenizer, tokenizer_fingerprint

_KEYS = (
    "dataset", "dataset_config", "dataset_revision", "text_column", "append_eos", "validation_fraction", "seed",
    "encoding",
)  # fmt: skip

FileList = dict[str, list[dict[str, Any]]]
Recipe = dict[str, Any]  # what decides a store's ids, by the keys of `store.json`; `files` is their content's checksum


def facts_of(source: Source, *, checksums: bool) -> dict[str, Any]:
    """What identifies the text, by the keys of `store.json`; `files` only where they are the user's own."""
    files = source.files
    if files is None:
        return {
            "dataset": source.dataset,
            "dataset_config": source.dataset if source.dataset in WIKITEXT else source.config,
            "dataset_revision": source.revision,
            "text_column": None if source.dataset == "demo" else source.text_column,
        }
    return {
        "dataset": source.name,
        "dataset_config": files.config,
        "text_column": None if files.kind == "lines" else source.text_column,
        **({"encoding": source.encoding} if source.encoding else {}),
        "files": files.listed(checksums=checksums),
    }


def record_of(
    facts: dict[str, Any], corpus: Corpus, tokenizer: SavedTokenizer, append_eos: bool, source: Source
) -> dict[str, Any]:
    """The part of `store.json` that says what was done; `facts` are those of `source`, with checksums."""
    files: FileList = facts.get("files", {})
    commit = hub.commits.get(tokenizer.name)
    paths = [str(Path(name).resolve()) for name in (source.dataset, *source.more)]  # where evaluation finds the text
    return {
        **{key: value for key, value in facts.items() if key != "files"},
        "dataset_name": corpus.name,
        "revision": _checksum(files) if files else corpus.revision,
        "rows_are_documents": corpus.rows_are_documents,
        "append_eos": append_eos,
        **(corpus.cut or {"validation_fraction": None, "seed": None}),
        "tokenizer": {"name": tokenizer.name, **({"commit": commit} if commit else {})},
        **({"files": files, "dataset_path": paths if source.more else paths[0]} if files else {}),
    }


def _checksum(files: FileList) -> str:
    content = [f"{split} {entry['sha256']}" for split, entries in files.items() for entry in entries]
    return "sha256:" + hashlib.sha256("\n".join(content).encode()).hexdigest()


def recipe_of(store: TokenStore) -> Recipe:
    record = store.record
    files = record.get("revision") if record.get("files") else None
    return {**{key: record.get(key) for key in _KEYS}, "tokenizer": record["tokenizer"].get("name"), "files": files}


def _source_of(store: TokenStore) -> Source:
    """Where the text is that `store` was made of."""
    record = store.record
    path, commit = record.get("dataset_path") or record.get("dataset"), str(record.get("revision"))
    dataset, *more = path if isinstance(path, list) else [str(path)]
    return Source(
        dataset,
        None if dataset in (*WIKITEXT, "demo") else record.get("dataset_config"),
        record.get("text_column") or "text",
        record.get("validation_fraction"),
        CUT_SEED if record.get("seed") is None else int(record["seed"]),
        record.get("encoding"),
        tuple(more),
        commit if re.fullmatch(r"[0-9a-f]{40}", commit) else None,
    )


def check_recipe(source: Source, tokenizer: str, append_eos: bool | None, store: TokenStore) -> None:
    """Raise UserError where a store made of these would have another recipe than `store`.

    What only the text can tell is taken from the store.
    """
    made, facts, record = recipe_of(store), facts_of(source, checksums=False), store.record
    cut = made["validation_fraction"] is not None
    if not cut and source.validation_fraction is not None and "validation" in store.splits:
        raise UserError(unused_fraction(source, True))
    fraction = DEFAULT_VALIDATION_FRACTION if source.validation_fraction is None else source.validation_fraction
    if not tokenizer.startswith("train:") and Path(tokenizer).is_dir():
        same = tokenizer_fingerprint(tokenizer) == store.tokenizer_fingerprint
        tokenizer = made["tokenizer"] if same else f"that of {tokenizer}"
    same_revision = source.revision == _source_of(store).revision
    asked = {
        **{key: facts.get(key) for key in _KEYS},
        "dataset_revision": made["dataset_revision"] if same_revision else source.revision,
        "append_eos": record.get("rows_are_documents") if append_eos is None else append_eos,
        "validation_fraction": fraction if cut else None,
        "seed": source.seed if cut else None,
        "tokenizer": tokenizer,
        "files": _checksum_now(source, facts["files"], record) if "files" in facts else None,
    }
    different = []
    for name, recorded in made.items():
        if asked[name] != recorded and name != "files":
            values = ["none" if value is None else value for value in (recorded, asked[name])]
            different.append(f"{name} {values[0]} in the store, {values[1]} requested")
        elif asked[name] != recorded and asked["dataset"] == made["dataset"]:
            different.append("the files have changed")
    if different:
        raise UserError(
            f"{store.path}: was made with other settings ({'; '.join(different)}); remove the folder, "
            f"or make another store with {command_line('prepare')} --out DIR"
        )


def is_unchanged(source: Source, store: TokenStore) -> bool:
    """Whether the user's files are still those that `store` was made of; other sources do not change."""
    facts = facts_of(source, checksums=False)
    return "files" not in facts or _checksum_now(source, facts["files"], store.record) == store.record["revision"]


def _checksum_now(source: Source, now: FileList, record: dict[str, Any]) -> str:
    """Of the files' content; not computed where sizes and times are those of the record, nor where sizes differ."""
    made: FileList = record.get("files") or {}
    if _only(made, "bytes") != _only(now, "bytes"):
        return "of other sizes"
    if _only(made, "mtime_ns") == _only(now, "mtime_ns"):
        return str(record["revision"])
    return _checksum(facts_of(source, checksums=True)["files"])


def _only(files: FileList, key: str) -> dict[str, list[Any]]:
    return {split: [file.get(key) for file in entries] for split, entries in files.items()}


def open_again(store: TokenStore) -> Corpus:
    """The rows that `store` was made of. Raises UserError where they are missing or not the same."""
    source, record = _source_of(store), store.record
    if "files" in record and "dataset_path" not in record:
        raise UserError(f"{store.path} was made by an older wikift, which did not record where its text is")
    if problems := source_problems(source):
        raise UserError(*problems)
    check_recipe(source, str(store.path / "tokenizer"), record.get("append_eos"), store)
    corpus = open_source(source)
    if "files" not in record and corpus.revision != record.get("revision"):
        raise UserError(f"{source.dataset} is now at {corpus.revision}, the store is of {record.get('revision')}")
    return corpus
