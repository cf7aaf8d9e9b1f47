"""Chunks -> ids by gigatoken, which is a hundred times as fast as `tokenizers`, checked against `tokenizers`.

gigatoken is young, so it is checked in every preparation: on hostile strings at the
start, on every character that occurs, in a few surroundings (libraries know other versions of Unicode), and on 4 KB of
rows out of each chunk of some 2 MB, drawn by the chunk's content. At the first difference
`Disagreement` is raised, and the caller starts again with `encode.chunk_encoder`. Threads share one gigatoken and what
it has learned.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wikift.data.encode import Chunk, EncodeChunk, plain_tokenizer
from wikift.data.store import Encoded
from wikift.data.texts import Texts

SAMPLE_BYTES = 4096  # of a chunk of one to three million, compared with `tokenizers`
CACHE_BYTES = 300_000_000  # gigatoken's caches grow with every new word and are never emptied: beyond this, restart
_LEAST_BYTES_BETWEEN = 4_000_000
_SURROUNDINGS = ("{}", " {}", "a{}", "{}a", "1{}", "{}1", "{}'s", "{} ", "{}.", "{0}{0}")
_HIGH = np.uint64(0x8080808080808080)

# fmt: off
_HOSTILE = [
    "", " ", "\n", "\r\n", "\t \u00a0 ", "don't DON'T we've 'tis '' 's' I'LL", "a  b   c    ", " a", "a ", "   x   ",
    "\u200b\u200d\ufeff", "e\u0301\u0301", "👩‍👩‍👧‍👦🏳️‍🌈", "\x00\x01\x7f\x85\xa0", "<|endoftext|>",
    "a<|endoftext|> b<|endoftext|>", "<|endoftext|", "मनीष नमस्ते", "สวัสดีครับ", "שלום עולם", "العربية ـــ",
    "漢字かな交じり文。テスト", "\U0001d518\U0001d52b\U0001d526 \U00010380", "½ Ⅷ ٣ \u09ea 1,234.5",
    "\u2028\u2029\x1c\x1d",
    "ﷺ" * 5, "\U0010ffff\ue000\ufdd0", "a\u00adb", " @-@ @,@ = = = <unk> \n", "=" * 50, " " * 50 + "x",
    "1234567890" * 5,
]
# fmt: on


class Disagreement(Exception):
    """gigatoken returned other ids than `tokenizers`, or could not read the tokenizer; the message says where."""


def why_not(gpt2s_kind: bool) -> str | None:
    """Why gigatoken is not to be used: None where it may be."""
    if importlib.util.find_spec("gigatoken") is None:
        return "gigatoken is not installed"
    return None if gpt2s_kind else "gigatoken is used for tokenizers of GPT-2's kind only"


def fast_chunk_encoder(tokenizer_file: Path, eos_token_id: int | None, dtype: str) -> EncodeChunk:
    """As `encode.chunk_encoder`, with gigatoken. Raises Disagreement, at once or from the encoding."""
    reference = plain_tokenizer(tokenizer_file)
    fast = _load(tokenizer_file)
    since, resident, lock = 0, _resident_bytes(), threading.Lock()
    known = np.zeros(0x110000, np.bool_)  # characters that were compared

    def compare(texts: Texts, numbers: list[int], ids: npt.NDArray[Any], ends: npt.NDArray[np.int64]) -> None:
        """Those of the texts that have these numbers."""
        wanted = [texts.data[texts.offsets[i] : texts.offsets[i + 1]].tobytes().decode() for i in numbers]
        encoded = reference.encode_batch_fast(wanted, add_special_tokens=False)
        for i, text, right in zip(numbers, wanted, encoded, strict=True):
            if ids[ends[i - 1] if i else 0 : ends[i]].tolist() != right.ids:
                raise Disagreement(f"gigatoken and tokenizers return different ids for {text[:80]!r}")

    def compare_characters(here: Any, texts: Texts) -> None:
        codes = _beyond_ascii(texts.data)
        if len(fresh := np.unique(codes[~known[codes]])):
            wanted = Texts.of(form.format(chr(code)) for code in fresh for form in _SURROUNDINGS)
            compare(wanted, list(range(len(wanted))), *_encode(here, wanted))
            known[fresh] = True

    def encode(chunk: Chunk) -> Encoded:
        nonlocal fast, since
        with lock:
            here = fast
        ids, ends = _encode(here, chunk.texts)
        compare_characters(here, chunk.texts)
        if chosen := _sample(chunk.texts):
            compare(chunk.texts, chosen, ids, ends)
        else:  # long texts: a whole one would take longer than all the rest
            start = Texts.of((chunk.texts.data[:SAMPLE_BYTES].tobytes().decode(errors="ignore"),))
            compare(start, [0], *_encode(here, start))
        del here
        with lock:
            since += len(chunk.texts.data)
            # against the memory of the start: another thread may still hold the old one when the new one is there
            if since >= _LEAST_BYTES_BETWEEN and _resident_bytes() - resident > CACHE_BYTES:
                fast = None
                gc.collect()
                fast, since = _load(tokenizer_file), 0
        return chunk.encoded(ids, ends, eos_token_id, dtype)

    encode(Chunk(Texts.of(_HOSTILE), np.ones(len(_HOSTILE), np.bool_)))
    return encode


def _load(tokenizer_file: Path) -> Any:
    import gigatoken

    try:
        return gigatoken.Tokenizer.from_json(tokenizer_file.read_bytes())
    except Exception as error:  # Rust's own
        raise Disagreement(f"gigatoken cannot read the tokenizer ({error})") from None


def _encode(fast: Any, texts: Texts) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """The ids of all texts end to end, and where each text's end."""
    import awkward
    from awkward.contents import ListOffsetArray, NumpyArray
    from awkward.index import Index64

    characters = NumpyArray(texts.data, parameters={"__array__": "char"})
    content = ListOffsetArray(Index64(texts.offsets), characters, parameters={"__array__": "string"})
    encoded = fast.encode_batch(awkward.Array(content), parallel=False).layout
    offsets = np.asarray(encoded.offsets)
    return np.asarray(encoded.content.data)[offsets[0] : offsets[-1]], offsets[1:] - offsets[0]


def _beyond_ascii(data: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint32]:
    """The characters of UTF-8 `data` that are not ASCII, in order. Eight bytes at a time: most text has few."""
    aligned = len(data) // 8 * 8
    eights = data[:aligned].view(np.uint64)
    some = np.concatenate((eights[(eights & _HIGH) != 0].view(np.uint8), data[aligned:]))
    text = some[some >= 0x80].tobytes().decode()  # a character's bytes are all of them beyond
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def _sample(texts: Texts) -> list[int]:
    """Short texts to compare: some somewhere, of about 4 KB together, and one that is not ASCII."""
    if len(texts.data) <= SAMPLE_BYTES:
        return list(range(len(texts)))
    seed = int.from_bytes(texts.data[-8:].tobytes(), "little") + len(texts.data)
    start = int(np.random.default_rng(seed).integers(len(texts)))
    end = int(np.searchsorted(texts.offsets, texts.offsets[start] + SAMPLE_BYTES))
    chosen = set(range(start, max(start + 1, min(end, len(texts)))))
    beyond = np.flatnonzero(texts.data[texts.offsets[start] :] >= 0x80)
    if len(beyond):
        chosen.add(int(np.searchsorted(texts.offsets, texts.offsets[start] + beyond[0], "right")) - 1)
    lengths = texts.lengths
    return sorted(number for number in chosen if lengths[number] <= 4 * SAMPLE_BYTES)


def _resident_bytes() -> int:
    """Of this process now; 0 where the system does not say, so that nothing is restarted there."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
