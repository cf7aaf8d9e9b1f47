"""The store: what is written is what is read, and every kind of damage has its own message."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wikift.base.errors import UserError
from wikift.base.files import sealed
from wikift.data.store import Encoded, TokenStore, open_store, write_store


def made(folder: Path, *, vocab_size: int = 50257, largest: int = 50256, **record: Any) -> TokenStore:
    ids = np.concatenate((np.arange(20_000) % (largest + 1), [largest]))
    splits = {
        "train": [Encoded(ids[:7], 2, 9, 30), Encoded(ids[7:], 5, 20_000, 90_000)],
        "validation": [Encoded(ids[:11], 1, 4, 50)],
        "test": [],
    }
    return write_store(
        folder, splits, vocab_size=vocab_size, eos_token_id=largest, tokenizer_fingerprint="f" * 64, record=record
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    store = made(tmp_path / "store", dataset="mine", tokenizer={"name": "theirs"})
    again = open_store(str(tmp_path / "store"), verify=True)
    assert again == store
    assert (store.dtype, store.vocab_size, store.eos_token_id) == ("uint16", 50257, 50256)
    train = store.splits["train"]
    assert (train.rows, train.tokens, train.words, train.bytes, train.largest_id) == (7, 20_001, 20_009, 90_030, 50256)
    assert store.splits["test"].tokens == 0
    ids = store.tokens("train")
    assert ids.dtype == np.uint16
    assert ids.tolist() == [*range(20_000), 50256]
    assert len(store.tokens("test")) == 0
    assert not ids.flags.writeable
    assert store.record["dataset"] == "mine"
    assert store.record["tokenizer"] == {
        "name": "theirs", "fingerprint": "f" * 64, "vocab_size": 50257, "eos_token_id": 50256, "files": {}
    }  # fmt: skip
    raw = (tmp_path / "store" / "train.bin").read_bytes()
    assert raw[:6] == b"\0\0\1\0\2\0", "little-endian, two bytes a token, no header"
    assert hashlib.sha256(raw).hexdigest() == train.sha256


@pytest.mark.parametrize(("vocab_size", "dtype", "width"), [(65_536, "uint16", 2), (65_537, "uint32", 4)])
def test_the_vocabulary_decides_the_width(tmp_path: Path, vocab_size: int, dtype: str, width: int) -> None:
    store = made(tmp_path, vocab_size=vocab_size, largest=vocab_size - 1)
    assert (store.dtype, (tmp_path / "train.bin").stat().st_size) == (dtype, 20_001 * width)
    assert int(store.tokens("train")[-1]) == vocab_size - 1


def test_the_fingerprint_is_of_the_ids_alone(tmp_path: Path) -> None:
    first = made(tmp_path / "a", dataset="one").fingerprint
    assert made(tmp_path / "b", dataset="another").fingerprint == first
    assert made(tmp_path / "c", largest=50_000).fingerprint != first
    assert made(tmp_path / "d", vocab_size=70_000).fingerprint != first, "another dtype is another file"


def resize(size: int) -> Callable[[Path], None]:
    return lambda store: os.truncate(store / "train.bin", size)


def edit(**changes: Any) -> Callable[[Path], None]:
    def damage(store: Path) -> None:
        record = json.loads((store / "store.json").read_text())
        ((path, value),) = changes.items()
        *parents, last = path.split("__")
        inner = functools.reduce(dict.__getitem__, parents, record)
        inner[last] = value
        if value is ...:
            del inner[last]
        (store / "store.json").write_text(json.dumps(sealed(record)))

    return damage


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda store: (store / name).write_text(text) and None


def flip(name: str, last: bytes) -> Callable[[Path], None]:
    """One bit of a file, of the last of these bytes."""

    def damage(store: Path) -> None:
        content = bytearray((store / name).read_bytes())
        content[content.index(last) + len(last) - 1] ^= 1
        (store / name).write_bytes(content)

    return damage


def overwrite(position: int, ids: int) -> Callable[[Path], None]:
    def damage(store: Path) -> None:
        with open(store / "train.bin", "r+b") as file:
            file.seek(2 * position)
            file.write(np.uint16(ids).tobytes())

    return damage


DAMAGES: list[tuple[str, Callable[[Path], None], str]] = [
    ("no store.json", lambda s: (s / "store.json").unlink(), "is no token store, it has no store.json; name one"),
    ("no split", lambda s: (s / "train.bin").unlink(), r"train.bin is damaged: it is missing; remove the folder"),
    ("truncated", resize(40_000), r"train.bin is damaged: 40,000 bytes, store.json says 40,002; remove the folder"),
    ("too long", resize(40_004), r"train.bin is damaged: 40,004 bytes"),
    ("not JSON", write("store.json", '{"format": "wikift-st'), r"store.json is damaged \(JSONDecodeError: Unterm"),
    ("not an object", write("store.json", "[]"), r"store.json is damaged"),
    ("foreign", write("store.json", '{"format": "zarr"}'), r"has format zarr, this version \(.*\) reads wikift-sto"),
    ("newer", edit(format="wikift-store-9"), r"has format wikift-store-9, this version \(.*\) reads wikift-store-1"),
    ("dtype", edit(dtype="float32"), r"store.json is damaged \(ValueError: dtype float32"),
    ("byte order", edit(byte_order="big"), "byte order big"),
    ("field gone", edit(splits=...), r"store.json is damaged \(KeyError: 'splits'\); remove the folder"),
    ("count gone", edit(splits__train__tokens=...), "store.json is damaged .*'tokens'"),
    ("count no number", edit(splits__train__tokens="many"), "store.json is damaged .*counts of train"),
    ("another's file", edit(splits__train__file="../../etc/passwd"), "store.json is damaged .*outside of the folder"),
    ("a flip", flip("store.json", b'"words": 2'), r"store.json is damaged \(ValueError: it has changed since it was"),
    ("a tokenizer's flip", flip("tokenizer/x", b"x"), "tokenizer/x is damaged: it has changed since it was written"),
    ("vocabulary", edit(tokenizer__vocab_size=50_000), "damaged: id 50256; .* the vocabulary has 50000"),
    ("id beyond the end", overwrite(20_000, 60_000), "train.bin is damaged: id 60000; the largest written was 50256"),
]


@pytest.mark.parametrize(("damage", "message"), [d[1:] for d in DAMAGES], ids=[d[0] for d in DAMAGES])
def test_damage_is_told_by_opening(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "x").write_text("x")
    made(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        open_store(tmp_path)
    assert all(problem.startswith(f"--data {tmp_path}: ") for problem in caught.value.problems)
    with pytest.raises(UserError, match=r"^--out "):
        open_store(tmp_path, setting="--out")


def test_verify_reads_every_byte(tmp_path: Path) -> None:
    made(tmp_path)
    overwrite(4097, 5)(tmp_path)
    open_store(tmp_path)  # sampling can't see it
    with pytest.raises(UserError, match=r"train.bin is damaged: its SHA-256 is not the one in store.json"):
        open_store(tmp_path, verify=True)
