"""gigatoken's ids are those of `tokenizers`, or it is not believed: on hostile rows, cuts, threads and a false one."""

from __future__ import annotations

import functools
import itertools
import unicodedata
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.hostile import TEXTS
from tests.data.test_encode import batches, encoded, encoder_of, ids_of, some_rows
from tests.real import needs_data, validation_rows
from wikift.commands.prepare import main
from wikift.data import encode, fast_encode, prepare, tokenizer
from wikift.data.encode import Chunk, chunks, encode_all
from wikift.data.fast_encode import HOSTILE
from wikift.data.store import open_store
from wikift.data.texts import Texts, count_words

fast_of = functools.cache(fast_encode.fast_chunk_encoder)


def chunk_of(texts: list[str]) -> Chunk:
    return Chunk(Texts.of(texts), np.ones(len(texts), np.bool_))


def both(saved: tokenizer.SavedTokenizer, rows: list[str], workers: int, eos: int | None) -> None:
    """The two encoders give the same ids and counts for `rows`."""
    expected = encoded(saved, rows, eos)
    fast = fast_encode.fast_chunk_encoder(saved.file, eos, "uint16")
    found = list(encode_all(chunks(batches(rows), cut=True), fast, workers))
    assert ids_of(found) == ids_of(expected)
    assert all(part.ids.dtype == np.dtype("<u2") for part in found)
    for count in ("rows", "words", "bytes"):
        assert sum(getattr(part, count) for part in found) == sum(getattr(part, count) for part in expected)


@pytest.mark.parametrize("workers", [1, 3])
def test_ids_and_counts_are_those_of_tokenizers(small: tokenizer.SavedTokenizer, workers: int) -> None:
    with mock.patch.object(encode, "CHUNK_CHARACTERS", 900):
        both(small, some_rows(), workers, None)
        both(small, some_rows(), workers, small.eos_token_id)


@needs_data
def test_real_rows_have_gpt2s_ids(gpt2: tokenizer.SavedTokenizer) -> None:
    both(gpt2, [*validation_rows(), *HOSTILE], 2, gpt2.eos_token_id)


def same_or_told(saved: tokenizer.SavedTokenizer, texts: list[str]) -> bool:
    """Whether the ids are the same; a disagreement may be over a character that is too new for one of the two."""
    chunk = chunk_of(texts)
    try:
        ids = fast_of(saved.file, None, "uint16")(chunk).ids.tolist()
    except fast_encode.Disagreement:
        return any(unicodedata.ucd_3_2_0.category(character) == "Cn" for character in "".join(texts))
    return bool(ids == encoder_of(saved.file, None, "uint16")(chunk).ids.tolist())


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.text() | TEXTS, min_size=1, max_size=5))
def test_any_text_has_the_same_ids(small: tokenizer.SavedTokenizer, texts: list[str]) -> None:
    assert same_or_told(small, texts)


@pytest.mark.parametrize("new", ["\U000323b0", "\u088f"])
def test_a_character_that_one_of_the_two_does_not_know_is_found(small: tokenizer.SavedTokenizer, new: str) -> None:
    """In one row of ten thousand, where the sample does not see it."""
    rows = [f"the cat's {number} a1 there\n" for number in range(10_000)]
    rows[4321] = f"the {new}'s then\n"
    assert same_or_told(small, rows)


def test_a_restarted_tokenizer_returns_the_same_ids(small: tokenizer.SavedTokenizer) -> None:
    with (
        mock.patch.object(fast_encode, "RESTART_BYTES", 2000),
        mock.patch.object(fast_encode, "_load", wraps=fast_encode._load) as load,
        mock.patch.object(encode, "CHUNK_CHARACTERS", 900),
    ):
        both(small, some_rows(), 2, None)
    size = sum(len(row.encode()) for row in some_rows())
    assert 1 + size / 4000 < load.call_count <= 1 + size / 2000


def test_other_ids_are_found_and_the_store_is_that_of_tokenizers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A gigatoken whose third call and all that follow have wrong ids: prepare says so and encodes with tokenizers."""
    (tmp_path / "t.txt").write_text("".join(f"the cat and the dog number {i} ran away\n" for i in range(3000)))
    right, calls = fast_encode._encode, itertools.count()

    def wrong(fast: object, texts: Texts) -> tuple[np.ndarray, np.ndarray]:
        ids, ends = right(fast, texts)
        return (ids + 1 if next(calls) > 1 else ids), ends

    def prepared(name: str) -> tuple[str, str]:
        line = f"--dataset {tmp_path}/t.txt --tokenizer train:300 --out {tmp_path / name}"
        assert main(line.split()) == 0
        return open_store(tmp_path / name, verify=True).fingerprint, capsys.readouterr().err

    true, told = prepared("true")
    assert "tokenizers" not in told
    with (
        mock.patch.object(encode, "CHUNK_CHARACTERS", 20_000),
        mock.patch.object(prepare, "SLOW_BYTES", 0),
        mock.patch.object(fast_encode, "_encode", wrong),
    ):
        false, told = prepared("false")
    assert "return different ids for" in told
    assert "encoding with tokenizers" in told
    assert false == true


def test_a_tokenizer_that_it_cannot_read_is_a_disagreement(small: tokenizer.SavedTokenizer, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(small.file.read_text().replace('"BPE"', '"Unheard"'))
    with pytest.raises(fast_encode.Disagreement, match="cannot read"):
        fast_encode._load(file)


def test_the_last_hostile_string_and_long_texts_are_compared(small: tokenizer.SavedTokenizer) -> None:
    """Other ids for the last of many texts alone are a disagreement before any text is read."""
    right = fast_encode._encode

    def wrong(fast: object, texts: Texts) -> tuple[np.ndarray, np.ndarray]:
        ids, ends = right(fast, texts)
        return np.append(ids[:-1], ids[-1] + 1), ends

    encode_chunk = fast_encode.fast_chunk_encoder(small.file, None, "uint16")
    with mock.patch.object(fast_encode, "_encode", wrong):
        with pytest.raises(fast_encode.Disagreement, match="different ids"):
            fast_encode.fast_chunk_encoder(small.file, None, "uint16")
        with pytest.raises(fast_encode.Disagreement, match="different ids"):
            encode_chunk(chunk_of(["the cat then " * 3000] * 2))


WHITE = [c for c in map(chr, range(0x110000)) if c.isspace()]


@settings(max_examples=300, deadline=None)
@given(
    texts=st.lists(
        st.lists(
            st.sampled_from([*WHITE, *"ab\u200b\u180e\u2027\u2060\u3001é漢😀"])
            | st.characters(exclude_categories=["Cs"])
        ).map("".join),
        max_size=8,
    )
)
def test_words_are_those_of_split(texts: list[str]) -> None:
    assert count_words(Texts.of(texts)) == sum(len(text.split()) for text in texts)
