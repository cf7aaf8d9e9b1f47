# python -m pytest tests/data/test_encode.py
"""Ids are those of the tokenizer on whole rows: over cuts, chunks, workers and hostile Unicode."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.data.hostile import HANDPICKED, TEXTS
from tests.real import GPT2_TOKENIZER, needs_data, validation_rows
from wikift.base.errors import UserError
from wikift.data import cuts as cutting
from wikift.data import encode, tokenizer
from wikift.data.cuts import Cuts, cut_rule, pieces, training_texts
from wikift.data.encode import Chunk, chunks, encode_all
from wikift.data.store import Encoded
from wikift.data.texts import Texts


def whole(saved: tokenizer.SavedTokenizer, text: str) -> list[int]:
    ids: list[int] = loaded(saved).encode(text, add_special_tokens=False).ids
    return ids


_LOADED: dict[Path, Tokenizer] = {}
_RULES: dict[Path, tuple[str, ...] | None] = {}
_ENCODERS: dict[tuple[Path, int | None], encode.EncodeChunk] = {}


def loaded(saved: tokenizer.SavedTokenizer) -> Tokenizer:
    if saved.file not in _LOADED:
        _LOADED[saved.file] = Tokenizer.from_file(str(saved.file))
    return _LOADED[saved.file]


def encoded(
    saved: tokenizer.SavedTokenizer, texts: Iterable[tuple[str, bool]], cuts: Cuts, eos: int | None = None
) -> list[Encoded]:
    one = _ENCODERS.get((saved.file, eos)) or encode.chunk_encoder(saved.file, eos, "uint16")
    _ENCODERS[saved.file, eos] = one
    return [one(chunk) for chunk in chunks(batches(texts), cuts)]


def batches(texts: Iterable[tuple[str, bool]], size: int = 3) -> Iterator[tuple[Texts, np.ndarray]]:
    """`size` texts at a time, as they come."""
    texts = iter(texts)
    while some := list(itertools.islice(texts, size)):
        yield Texts.of(text for text, _ in some), np.array([end for _, end in some])


def ids_of(parts: Iterable[Encoded]) -> list[int]:
    return [int(i) for part in parts for i in part.ids]


@contextlib.contextmanager
def small_limits(long: int, hopeless: int, search: int = 5) -> Iterator[None]:
    with (
        mock.patch.multiple(cutting, LONG_CHARACTERS=long, HOPELESS_CHARACTERS=hopeless, _SEARCH_CHARACTERS=search),
        mock.patch.object(encode, "CHUNK_CHARACTERS", 50),
    ):
        yield


def check_cuts(saved: tokenizer.SavedTokenizer, text: str, long: int, arrive: list[int]) -> None:
    """`text` as one row in pieces, arriving in texts that end at `arrive`, gives the ids and counts of the whole."""
    cuts = Cuts(unsplit=_RULES.get(saved.file) or cut_rule(saved.file).unsplit)
    _RULES[saved.file] = cuts.unsplit
    places = [0, *sorted({place % (len(text) + 1) for place in arrive}), len(text)]
    parts = [text[a:b] for a, b in itertools.pairwise(places) if b > a] or [text]
    row = [(part, i == len(parts) - 1) for i, part in enumerate(parts)]
    with small_limits(long, 1000):
        found = encoded(saved, row, cuts)
    assert cuts.inexact == 0
    assert ids_of(found) == whole(saved, text)
    assert sum(part.rows for part in found) == 1
    assert sum(part.words for part in found) == len(text.split()) + 1
    assert sum(part.bytes for part in found) == len(text.encode())


@settings(max_examples=400, deadline=None)
@given(text=TEXTS, long=st.integers(1, 30), arrive=st.lists(st.integers(0, 200), max_size=3))
@example(text="a<|endoftext|>b c<|endoftext|>" * 4, long=3, arrive=[])
@example(text="I'll don't 'll x's " * 5, long=2, arrive=[4])
def test_cut_rows_have_the_ids_of_whole_rows(
    small: tokenizer.SavedTokenizer, text: str, long: int, arrive: list[int]
) -> None:
    check_cuts(small, text, long, arrive)


@needs_data
@settings(max_examples=400, deadline=None)
@given(text=TEXTS, long=st.integers(1, 30), arrive=st.lists(st.integers(0, 200), max_size=3))
def test_cut_rows_have_gpt2s_ids(gpt2: tokenizer.SavedTokenizer, text: str, long: int, arrive: list[int]) -> None:
    check_cuts(gpt2, text, long, arrive)


def test_long_rows_are_cut_where_they_can_be(small: tokenizer.SavedTokenizer) -> None:
    text = "the cat's (x) " * 40_000
    cuts = cut_rule(small.file)
    parts = list(pieces([(text, True)], cuts))
    assert len(parts) > 8
    assert max(len(part) for part, _, _ in parts) <= cutting.LONG_CHARACTERS
    assert "".join(part for part, _, _ in parts) == text
    assert [end for _, end, _ in parts] == [False] * (len(parts) - 1) + [True]
    assert (cuts.exact, cuts.inexact) == (1, 0)


def test_a_row_without_a_place_is_cut_all_the_same_and_told(small: tokenizer.SavedTokenizer) -> None:
    cuts = cut_rule(small.file)
    parts = [
        part for part, _, _ in pieces([("x" * 2_500_000, False), ("x" * 700_000 + "\n", True), ("short", True)], cuts)
    ]
    assert [len(part) for part in parts] == [1_000_000, 1_000_000, 1_000_000, 200_001, 5]
    assert (cuts.exact, cuts.inexact) == (0, 1)
    with small_limits(3, 7):
        found = encoded(small, [("x" * 100, True)], cuts)
    assert loaded(small).decode(ids_of(found)) == "x" * 100
    assert sum(part.words for part in found) == 2, "one word and the end of the line"


def test_other_tokenizers_rows_stay_whole(tmp_path: Path, small: tokenizer.SavedTokenizer) -> None:
    from tokenizers import normalizers, pre_tokenizers

    changed = Tokenizer.from_file(str(small.file))
    for number, change in enumerate(
        (
            {"normalizer": normalizers.NFC()},
            {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
            {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)},
        )
    ):
        other = Tokenizer.from_str(changed.to_str())
        for name, value in change.items():
            setattr(other, name, value)
        file = tmp_path / f"{number}.json"
        other.save(str(file))
        cuts = cut_rule(file)
        with small_limits(3, 7):
            texts = list(pieces([("some words ", False), ("and more", True), ("x", True)], cuts))
        assert texts == [("some words and more", True, False), ("x", True, False)]
        assert (cuts.exact, cuts.inexact) == (0, 0)


def test_end_of_text_follows_each_row_once(small: tokenizer.SavedTokenizer) -> None:
    rows = ["one two three four", "", "five"]
    with small_limits(4, 1000):
        found = encoded(small, [(row, True) for row in rows], cut_rule(small.file), eos=small.eos_token_id)
    assert ids_of(found) == [i for row in rows for i in [*whole(small, row), small.eos_token_id]]
    assert sum(part.words for part in found) == 4 + 0 + 1 + 3


@needs_data
def test_real_rows_and_hostile_ones_have_hugging_faces_ids(gpt2: tokenizer.SavedTokenizer) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(GPT2_TOKENIZER)
    rows = [*validation_rows(), *HANDPICKED]
    expected = [i for ids in theirs(rows, add_special_tokens=False)["input_ids"] for i in ids]
    found = encoded(gpt2, [(row, True) for row in rows], cut_rule(gpt2.file))
    assert ids_of(found) == expected
    real = encoded(gpt2, [(row, True) for row in validation_rows()], cut_rule(gpt2.file))
    assert sum(len(part.ids) for part in real) == 256_061
    assert sum(part.words for part in real) == 217_646
    assert sum(part.rows for part in real) == 3_760


@settings(max_examples=200, deadline=None)
@given(text=st.text() | TEXTS)
def test_any_text_survives_a_round_trip(small: tokenizer.SavedTokenizer, text: str) -> None:
    ids = ids_of(encoded(small, [(text, True)], cut_rule(small.file)))
    assert loaded(small).decode(ids, skip_special_tokens=False) == text


def some_rows(count: int = 400) -> list[tuple[str, bool]]:
    return [(f"row {i} " + HANDPICKED[i % len(HANDPICKED)] * (i % 5) + "\n", True) for i in range(count)]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_do_not_show_in_the_result(small: tokenizer.SavedTokenizer, workers: int) -> None:
    expected = encoded(small, some_rows(), cut_rule(small.file))
    with mock.patch.object(encode, "CHUNK_CHARACTERS", 900):
        parts = chunks(batches(some_rows()), cut_rule(small.file))
        found = list(encode_all(parts, encode.chunk_encoder(small.file, None, "uint16"), workers))
    assert len(found) > 2 * workers + 1, "more than are in flight"
    assert ids_of(found) == ids_of(expected)


def test_chunks_in_flight_are_bounded_and_an_error_ends_the_threads(small: tokenizer.SavedTokenizer) -> None:
    taken = 0

    def source() -> Iterator[Chunk]:
        nonlocal taken
        for _ in range(200):
            taken += 1
            yield Chunk(Texts.of(["some text"]), np.array([True]), 0)
        raise UserError("line 201: is bad")

    encode_chunk = encode.chunk_encoder(small.file, None, "uint16")
    found = encode_all(source(), encode_chunk, 2)
    for number, _ in enumerate(itertools.islice(found, 195)):
        assert taken - number <= 2 * 2 + 1
    with pytest.raises(UserError, match="line 201"):
        list(found)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("encode")]


def test_training_texts_are_the_text_in_pieces() -> None:
    text = "a word " * 30_000
    found = list(training_texts([(text, False), ("x" * 10, True), ("\n", True)], tokenizer.EOS))
    assert "".join(found) == text + "x" * 10 + "\n"
    assert max(map(len, found)) <= cutting.LONG_CHARACTERS


def test_memory_of_a_long_row_is_bounded(small: tokenizer.SavedTokenizer) -> None:
    """30 MB of one row: the texts in flight, and not the row, are held."""
    import tracemalloc

    def arriving() -> Iterator[tuple[str, bool]]:
        for number in range(30):
            yield "the cat's (x) " * 75_000, number == 29

    tracemalloc.start()
    start = time.monotonic()
    count = sum(len(text) for chunk in chunks(batches(arriving(), 1), cut_rule(small.file)) for text in chunk.texts)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 30 * 75_000 * 14
    assert peak < 12e6, f"{peak:,} bytes"
    assert time.monotonic() - start < 30


def test_ids_are_raw_little_endian(small: tokenizer.SavedTokenizer) -> None:
    (part,) = encoded(small, [("the", True)], cut_rule(small.file))
    assert part.ids.dtype == np.dtype("<u2")
