"""The token store: one flat file of ids per split, made to be memory-mapped, and `store.json`, saying what they are.

    STORE/store.json        what was done, counts, checksums; written last
    STORE/train.bin         little-endian uint16, uint32 where the vocabulary needs it: 2 or 4 bytes a token, no header
    STORE/tokenizer/        the tokenizer that made the ids, as `save_pretrained` writes it

Opening takes milliseconds whatever the size: file sizes, data type and ids at sampled positions are checked, while
`verify=True` reads every byte. Imports neither torch nor transformers.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wikift import __version__
from wikift.base.command import command_line
from wikift.base.errors import UserError
from wikift.base.files import sha256_of, sync_folder

FORMAT = "wikift-store-1"
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
Ids = npt.NDArray[np.unsignedinteger[Any]]

_SAMPLED_POSITIONS = 256
_EDGE_TOKENS = 4096


@dataclass(frozen=True)
class Encoded:
    """Some rows as ids, in order. `words` counts one end of line per row, as the papers do; `bytes` are UTF-8's."""

    ids: Ids
    rows: int
    words: int
    bytes: int


@dataclass(frozen=True)
class Split:
    """Counts of one split, and its file. `largest_id` is -1 where there are no tokens."""

    rows: int
    tokens: int
    words: int
    bytes: int
    largest_id: int
    file: str
    sha256: str


@dataclass(frozen=True)
class TokenStore:
    """An opened store. `record` is the whole of `store.json`."""

    path: Path
    dtype: str
    vocab_size: int
    eos_token_id: int
    tokenizer_fingerprint: str
    splits: dict[str, Split]
    record: dict[str, Any]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Identifies the ids: equal for stores with the same tokens in every split, wherever and whenever made."""
        parts = [f"{name} {split.sha256}" for name, split in sorted(self.splits.items())]
        return hashlib.sha256("\n".join([self.dtype, self.tokenizer_fingerprint, *parts]).encode()).hexdigest()

    @property
    def has_validation(self) -> bool:
        """Whether there is validation text: a token, and one before it."""
        return "validation" in self.splits and self.splits["validation"].tokens > 1

    def tokens(self, split: str) -> Ids:
        """The ids of `split`, 1-D, read-only and memory-mapped. Raises UserError where there is no such split."""
        if split not in self.splits:
            raise UserError(f"split {split}: {self.path} has no such split; it has {', '.join(self.splits)}")
        if not self.splits[split].tokens:  # nothing cannot be mapped
            return np.empty(0, DTYPES[self.dtype])
        return np.memmap(self.path / self.splits[split].file, DTYPES[self.dtype], "r")


def dtype_for(vocab_size: int) -> str:
    """The narrowest data type that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def write_store(
    path: Path,
    splits: Mapping[str, Iterable[Encoded]],
    *,
    vocab_size: int,
    eos_token_id: int,
    tokenizer_fingerprint: str,
    record: Mapping[str, Any] | None = None,
) -> TokenStore:
    """Write `splits` into the folder `path`, `store.json` last, everything on the disk when it returns.

    Publishing is the caller's: `path` is meant to be renamed afterwards. `record` is merged into `store.json` once the
    splits have been consumed. Holds one `Encoded` at a time. Raises OSError as the file system does.
    """
    dtype = dtype_for(vocab_size)
    path.mkdir(parents=True, exist_ok=True)
    written = {name: _write_split(path / f"{name}.bin", parts, dtype) for name, parts in splits.items()}
    for name, split in written.items():
        assert split.largest_id < vocab_size, f"{name}: id {split.largest_id} in a vocabulary of {vocab_size}"
    extra = dict(record or {})
    tokenizer = {"fingerprint": tokenizer_fingerprint, "vocab_size": vocab_size, "eos_token_id": eos_token_id}
    content = {
        "format": FORMAT,
        "wikift": __version__,
        **extra,
        "tokenizer": {**extra.get("tokenizer", {}), **tokenizer},
        "dtype": dtype,
        "byte_order": "little",
        "splits": {name: asdict(split) for name, split in written.items()},
    }
    with open(path / "store.json", "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path)
    return open_store(path)


def _write_split(path: Path, parts: Iterable[Encoded], dtype: str) -> Split:
    digest = hashlib.sha256()
    rows = tokens = word_count = size = 0
    largest = -1
    with open(path, "wb") as file:
        for part in parts:
            raw = np.ascontiguousarray(part.ids, DTYPES[dtype]).data.cast("B") if len(part.ids) else b""
            if len(part.ids):
                largest = max(largest, int(part.ids.max()))
            digest.update(raw)
            file.write(raw)
            rows, tokens = rows + part.rows, tokens + len(part.ids)
            word_count, size = word_count + part.words, size + part.bytes
        file.flush()
        os.fsync(file.fileno())
    return Split(rows, tokens, word_count, size, largest, path.name, digest.hexdigest())


def open_store(path: str | Path, *, verify: bool = False, setting: str = "--data") -> TokenStore:
    """Open a store. Raises UserError, named after `setting`, where it is missing, foreign, damaged or truncated.

    Ids are checked against the vocabulary by the largest id recorded and at sampled positions (both ends and
    256 positions between); `verify=True` reads every byte and compares its SHA-256.
    """
    path = Path(path)
    where = f"{setting} {path}"
    record = _read_record(path, where)
    try:
        store = _from_record(path, record)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{where}: store.json has no valid {_name(error)}; remove the folder and prepare it again"
        ) from None
    if store.dtype not in DTYPES or record.get("byte_order") != "little":
        raise UserError(
            f"{where}: store.json says dtype {store.dtype!r}, byte order {record.get('byte_order')!r}; "
            f"wikift reads little-endian {' or '.join(DTYPES)}; prepare it again"
        )
    problems = [p for name in store.splits for p in _split_problems(store, name, where, verify)]
    if problems:
        raise UserError(*problems)
    return store


def _read_record(path: Path, where: str) -> dict[str, Any]:
    if not path.exists():
        raise UserError(f"{where}: no such folder; make it with {command_line('prepare')} --out {path} --dataset ...")
    if not path.is_dir():
        raise UserError(f"{where}: is a file, not a token store; name the folder that {command_line('prepare')} made")
    try:
        content = json.loads((path / "store.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{where}: has no store.json, so it is not a token store; name a folder that {command_line('prepare')} made"
        ) from None
    except OSError as error:
        raise UserError(f"{where}: store.json cannot be read ({error.strerror}); fix its permissions") from None
    except ValueError:
        raise UserError(f"{where}: store.json is not JSON (damaged); remove the folder and prepare it again") from None
    kind = content.get("format") if isinstance(content, dict) else None
    if kind == FORMAT:
        return dict(content)
    if isinstance(kind, str) and kind.startswith("wikift-store-"):
        raise UserError(
            f"{where}: has format {kind}, this version ({__version__}) reads {FORMAT}; prepare it again, or use the "
            f"version that made it ({content.get('wikift', 'unknown')})"
        )
    raise UserError(
        f"{where}: store.json is not wikift's (format {kind!r}); name a folder that {command_line('prepare')} made"
    )


def _from_record(path: Path, record: dict[str, Any]) -> TokenStore:
    tokenizer = record["tokenizer"]
    splits = {str(name): Split(**entry) for name, entry in record["splits"].items()}
    for split in splits.values():
        for count in (split.rows, split.tokens, split.words, split.bytes, split.largest_id):
            if not isinstance(count, int):
                raise TypeError("splits")
        if Path(split.file).name != split.file:  # a store never points outside of its folder
            raise ValueError("file")
    return TokenStore(
        path=path,
        dtype=str(record["dtype"]),
        vocab_size=int(tokenizer["vocab_size"]),
        eos_token_id=int(tokenizer["eos_token_id"]),
        tokenizer_fingerprint=str(tokenizer["fingerprint"]),
        splits=splits,
        record=record,
    )


def _name(error: Exception) -> str:
    return str(error.args[0]) if isinstance(error, KeyError) else "a value of tokenizer or splits"


def _split_problems(store: TokenStore, name: str, where: str, verify: bool) -> list[str]:
    split = store.splits[name]
    again = "remove the folder and prepare it again"
    path = store.path / split.file
    try:
        size = path.stat().st_size
        wanted = split.tokens * DTYPES[store.dtype].itemsize
        if size != wanted:
            kind = "truncated" if size < wanted else "too long"
            return [f"{where}: {split.file} is {kind}: {size:,} bytes, store.json says {wanted:,}; {again}"]
        if split.largest_id >= store.vocab_size:
            beyond = f"outside the vocabulary of {store.vocab_size}"
            return [f"{where}: id {split.largest_id} in {split.file} is {beyond}; {again}"]
        if verify and sha256_of(path) != split.sha256:
            return [f"{where}: {split.file} is damaged: its SHA-256 is not the one in store.json; {again}"]
        ids = store.tokens(name)
        positions = np.linspace(0, max(0, len(ids) - 1), _SAMPLED_POSITIONS, dtype=np.int64)
        sampled = np.concatenate((ids[:_EDGE_TOKENS], ids[-_EDGE_TOKENS:], ids[positions] if len(ids) else ids))
        if len(sampled) and int(sampled.max()) > split.largest_id:
            return [
                f"{where}: {split.file} is damaged: id {sampled.max()} is larger than any that was written "
                f"({split.largest_id}; the vocabulary has {store.vocab_size}); {again}"
            ]
    except FileNotFoundError:
        return [f"{where}: {split.file} is missing; {again}"]
    except OSError as error:
        return [f"{where}: {split.file} cannot be read ({error.strerror}); fix its permissions or the disk"]
    return []


def check_tokenizer(store: TokenStore, model: str | Path, *, setting: str = "--model") -> None:
    """Raise UserError where the tokenizer of `model`, a folder or a name, would not have made this store's ids."""
    from wikift.data.tokenizer import load_tokenizer, tokenizer_fingerprint

    if Path(model).is_dir():
        fingerprint = tokenizer_fingerprint(model, setting=setting)
    else:
        with tempfile.TemporaryDirectory() as folder:
            fingerprint = load_tokenizer(str(model), Path(folder)).fingerprint
    if fingerprint != store.tokenizer_fingerprint:
        name = store.record["tokenizer"].get("name", "another one")
        raise UserError(
            f"{setting} {model}: its tokenizer is not the one that made {store.path} ({name}); "
            f"prepare the text again with --tokenizer {model}, or use a model with {store.path}/tokenizer"
        )
