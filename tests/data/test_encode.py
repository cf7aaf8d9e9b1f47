"""Ids are those of the tokenizer on whole rows: over cuts, chunks, workers and hostile Unicode."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

from tests.data.hostile import TEXTS
from tests.real import GPT2_TOKENIZER, needs_data, validation_rows
from wikift.base.errors import UserError
from wikift.data import encode, tokenizer
from wikift.data.encode import Chunk, chunks, encode_all, pieces
from wikift.data.fast_encode import HOSTILE
from wikift.data.store import Encoded
from wikift.data.texts import Texts

tokenizer_of = functools.cache(Tokenizer.from_file)
encoder_of = functools.cache(encode.chunk_encoder)


def whole(saved: tokenizer.SavedTokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer_of(str(saved.file)).encode(text, add_special_tokens=False).ids
    return ids


def encoded(saved: tokenizer.SavedTokenizer, rows: Iterable[str], eos: int | None = None) -> list[Encoded]:
    return [encoder_of(saved.file, eos, "uint16")(chunk) for chunk in chunks(batches(rows), cut=True)]


def batches(rows: Iterable[str], size: int = 3) -> Iterator[Texts]:
    """`size` rows at a time, as they come."""
    rows = iter(rows)
    while some := list(itertools.islice(rows, size)):
        yield Texts.of(some)


def ids_of(parts: Iterable[Encoded]) -> list[int]:
    return [int(i) for part in parts for i in part.ids]


@pytest.mark.parametrize("kind", ["small", pytest.param("gpt2", marks=needs_data)])
@settings(max_examples=400, deadline=None)
@given(text=TEXTS, long=st.integers(1, 30), arrive=st.lists(st.integers(0, 200), max_size=3))
@example(text="a<|endoftext|>b c<|endoftext|>" * 4, long=3, arrive=[])
@example(text="I'll don't 'll x's " * 5, long=2, arrive=[4])
def test_cut_rows_have_the_ids_and_counts_of_whole_rows(
    request: pytest.FixtureRequest, kind: str, text: str, long: int, arrive: list[int]
) -> None:
    """As one row in pieces, and as a unit in texts that end at `arrive`."""
    saved = request.getfixturevalue(kind)
    ends = [0, *sorted(end % (len(text) + 1) for end in arrive), len(text)]
    arriving = [text[a:b] for a, b in itertools.pairwise(ends)]
    with mock.patch.multiple(encode, LONG_CHARACTERS=long, CHUNK_CHARACTERS=50):
        parts = encoded(saved, [text])
        unit = list(pieces((part, number == len(arrive)) for number, part in enumerate(arriving)))
    assert ids_of(parts) == whole(saved, text) == [i for piece, _ in unit for i in whole(saved, piece)]
    assert [last for _, last in unit] == [False] * (len(unit) - 1) + [True]
    assert sum(part.rows for part in parts) == 1
    assert sum(part.words for part in parts) == len(text.split()) + 1
    assert sum(part.bytes for part in parts) == len(text.encode())


def test_long_units_are_cut_where_words_end_and_nowhere_else() -> None:
    text = "the cat's (x) " * 40_000
    parts = [piece for piece, _ in pieces([(text, True)])]
    assert "".join(parts) == text
    assert len(parts) > 8
    assert max(map(len, parts)) <= encode.LONG_CHARACTERS + 10
    unbroken = "x" * 700_000
    assert list(pieces([(unbroken, False), (unbroken + "\n", True), ("short", True)])) == [
        (unbroken * 2, False), ("\n", True), ("short", True)
    ]  # fmt: skip
    assert list(pieces([("some words ", False), (text, True)], cut=False)) == [("some words " + text, True)]


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (True, {}),
        (False, {"normalizer": normalizers.NFC()}),
        (False, {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)}),
        (False, {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)}),
        (False, {"added": AddedToken("<x>", lstrip=True)}),
        (False, {"added": "two words"}),
    ],
)
def test_other_tokenizers_rows_stay_whole(
    tmp_path: Path, small: tokenizer.SavedTokenizer, kind: bool, change: dict[str, Any]
) -> None:
    other = Tokenizer.from_file(str(small.file))
    for name, value in change.items():
        if name == "added":
            other.add_tokens([value])
        else:
            setattr(other, name, value)
    other.save(str(tmp_path / "tokenizer.json"))
    assert encode.splits_at_spaces(tmp_path / "tokenizer.json") == kind


def test_end_of_text_follows_each_row_once(small: tokenizer.SavedTokenizer) -> None:
    rows = ["one two three four", "", "five"]
    with mock.patch.object(encode, "LONG_CHARACTERS", 4):
        parts = encoded(small, rows, eos=small.eos_token_id)
    assert ids_of(parts) == [i for row in rows for i in [*whole(small, row), small.eos_token_id]]
    assert sum(part.words for part in parts) == 4 + 0 + 1 + 3


@needs_data
def test_real_rows_and_hostile_ones_have_hugging_faces_ids(gpt2: tokenizer.SavedTokenizer) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(GPT2_TOKENIZER)
    rows = [*validation_rows(), *HOSTILE]
    expected = [i for ids in theirs(rows, add_special_tokens=False)["input_ids"] for i in ids]
    assert ids_of(encoded(gpt2, rows)) == expected


def some_rows(count: int = 400) -> list[str]:
    return [f"row {i} " + HOSTILE[i % len(HOSTILE)] * (i % 5) + "\n" for i in range(count)]


def test_chunks_in_flight_are_bounded_and_an_error_ends_the_threads(small: tokenizer.SavedTokenizer) -> None:
    taken = 0

    def source() -> Iterator[Chunk]:
        nonlocal taken
        for _ in range(200):
            taken += 1
            yield Chunk(Texts.of(["some text"]), np.array([True]))
        raise UserError("line 201: is bad")

    encode_chunk = encode.chunk_encoder(small.file, None, "uint16")
    found = encode_all(source(), encode_chunk, 2)
    for number, _ in enumerate(itertools.islice(found, 195)):
        assert taken - number <= 2 * 2 + 1
    with pytest.raises(UserError, match="line 201"):
        list(found)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("encode")]
