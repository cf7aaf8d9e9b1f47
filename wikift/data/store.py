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
import os
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wikift import __version__
from wikift.base.command import command_line
from wikift.base.errors import UserError
from wikift.base.files import content_of, digest, parse_object, replace_json, sealed, sha256_of, sums

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
        """The ids of `split`, 1-D, read-only and memory-mapped."""
        if not self.splits[split].tokens:  # nothing cannot be mapped
            return np.empty(0, DTYPES[self.dtype])
        return np.memmap(self.path / self.splits[split].file, DTYPES[self.dtype], "r")


def dtype_for(vocab_size: int) -> str:
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

    Publishing is the caller's: `path` is meant to be renamed afterwards. `record` is merged into `store.json`. Holds
    one `Encoded` at a time. Raises OSError as the file system does.
    """
    dtype = dtype_for(vocab_size)
    path.mkdir(parents=True, exist_ok=True)
    written = {name: _write_split(path / f"{name}.bin", parts, dtype) for name, parts in splits.items()}
    for name, split in written.items():
        assert split.largest_id < vocab_size, f"{name}: id {split.largest_id} in a vocabulary of {vocab_size}"
    tokenizer: dict[str, Any] = {"fingerprint": tokenizer_fingerprint, "vocab_size": vocab_size}
    tokenizer |= {"eos_token_id": eos_token_id, "files": sums(path / "tokenizer")}
    extra = record or {}
    content = {
        "format": FORMAT,
        "wikift": __version__,
        **extra,
        "tokenizer": {**extra.get("tokenizer", {}), **tokenizer},
        "dtype": dtype,
        "byte_order": "little",
        "splits": {name: asdict(split) for name, split in written.items()},
    }
    replace_json(path / "store.json", sealed(content))
    return open_store(path)


def _write_split(path: Path, parts: Iterable[Encoded], dtype: str) -> Split:
    digest = hashlib.sha256()
    rows = tokens = word_count = size = 0
    largest = -1
    with open(path, "wb") as file:
        for part in parts:
            raw = part.ids.astype(DTYPES[dtype]).tobytes()
            digest.update(raw)
            file.write(raw)
            largest = max(largest, int(part.ids.max())) if len(part.ids) else largest
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
    path, where = Path(path), f"{setting} {path}"
    again = "remove the folder and prepare it again"
    try:
        record = parse_object(content_of(path / "store.json"))
        if record.get("format") != FORMAT:
            raise UserError(
                f"{where}: store.json has format {record.get('format')}, this version ({__version__}) reads {FORMAT}; "
                f"prepare it again, or use the version that made it ({record.get('wikift', 'unknown')})"
            )
        if record.get("sha256", "") not in ("", digest(record)):  # stores of older versions have none
            raise ValueError("it has changed since it was written")
        store = _from_record(path, record)
        damages = {split.file: _damage(store, name, verify) for name, split in store.splits.items()}
        for name, sha256 in record["tokenizer"].get("files", {}).items():
            file = path / "tokenizer" / Path(name).name
            changed = not file.is_file() or sha256_of(file) != sha256
            damages[f"tokenizer/{name}"] = "it has changed since it was written" if changed else None
    except (FileNotFoundError, NotADirectoryError):
        what = "is no token store, it has no store.json" if path.exists() else "no such folder"
        option = f"--out {shlex.quote(str(path))} --dataset ..."
        made = f"name one that {command_line('prepare')} made, or make it with {option}"
        raise UserError(f"{where}: {what}; {made}") from None
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.filename}: {error.strerror}); fix its permissions") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{where}: store.json is damaged ({type(error).__name__}: {error}); {again}") from None
    if problems := [f"{where}: {file} is damaged: {damage}; {again}" for file, damage in damages.items() if damage]:
        raise UserError(*problems)
    return store


def _from_record(path: Path, record: dict[str, Any]) -> TokenStore:
    """Raises KeyError, TypeError, ValueError or AttributeError for what no `write_store` wrote."""
    tokenizer, dtype = record["tokenizer"], record["dtype"]
    if dtype not in DTYPES or record["byte_order"] != "little":
        raise ValueError(f"dtype {dtype}, byte order {record['byte_order']}")
    splits = {name: Split(**entry) for name, entry in record["splits"].items()}
    for name, split in splits.items():
        counts = (split.rows, split.tokens, split.words, split.bytes, split.largest_id)
        if not all(isinstance(count, int) for count in counts):
            raise ValueError(f"counts of {name}")
        if Path(split.file).name != split.file:
            raise ValueError(f"file of {name} outside of the folder")
    vocab_size, eos = int(tokenizer["vocab_size"]), int(tokenizer["eos_token_id"])
    return TokenStore(path, dtype, vocab_size, eos, str(tokenizer["fingerprint"]), splits, record)


def _damage(store: TokenStore, name: str, verify: bool) -> str | None:
    split = store.splits[name]
    path, wanted = store.path / split.file, split.tokens * DTYPES[store.dtype].itemsize
    if not path.is_file():
        return "it is missing"
    if (size := path.stat().st_size) != wanted:
        return f"{size:,} bytes, store.json says {wanted:,}"
    if verify and sha256_of(path) != split.sha256:
        return "its SHA-256 is not the one in store.json"
    ids = store.tokens(name)
    sampled = np.concatenate((ids[:_EDGE_TOKENS], ids[-_EDGE_TOKENS:], ids[:: 1 + len(ids) // _SAMPLED_POSITIONS]))
    largest = max(split.largest_id, int(sampled.max(initial=0)))
    if largest >= store.vocab_size or largest > max(0, split.largest_id):
        return f"id {largest}; the largest written was {split.largest_id}, the vocabulary has {store.vocab_size}"
    return None


def check_tokenizer(store: TokenStore, model: str | Path, *, setting: str = "--model") -> None:
    """Raise UserError where the tokenizer of `model`, a folder or a name, would not have made this store's ids."""
    from wikift.base import hub
    from wikift.data.tokenizer import tokenizer_fingerprint

    fingerprint = tokenizer_fingerprint(hub.fetch(str(model), setting, hub.TOKENIZER), setting=setting)
    if fingerprint != store.tokenizer_fingerprint:
        name = store.record["tokenizer"].get("name", "another one")
        raise UserError(
            f"{setting} {model}: its tokenizer is not the one that made {store.path} ({name}); "
            f"prepare the text again with --tokenizer {shlex.quote(str(model))}, or use a model with "
            f"{store.path}/tokenizer"
        )
