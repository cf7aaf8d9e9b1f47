"""Chunks -> ids by gigatoken, which is a hundred times as fast as `tokenizers`, checked against `tokenizers`.

gigatoken is young, so it is checked in every preparation: on hostile strings at the start, on every character beyond
ASCII that occurs, in a few surroundings (libraries know other versions of Unicode), and on 4 KB of rows out of each
chunk of some 2 MB, chosen by the chunk's content. At the first difference `Disagreement` is raised, and the caller
starts again with `encode.chunk_encoder`. Threads share one gigatoken and what it has learned.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wikift.data.encode import Chunk, EncodeChunk, plain_tokenizer
from wikift.data.store import Encoded
from wikift.data.texts import Texts

SAMPLE_BYTES = 4096  # of a chunk of one to three million, compared with `tokenizers`
RESTART_BYTES = 256_000_000  # gigatoken remembers every new word, up to 10 bytes for each byte of text: it is reloaded
_SURROUNDINGS = ("{}", " {}", "a{}", "{}a", "1{}", "{}1", "{}'s", "{} ", "{}.", "{0}{0}")

# fmt: off
HOSTILE = [
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


def fast_chunk_encoder(tokenizer_file: Path, eos_token_id: int | None, dtype: str) -> EncodeChunk:
    """As `encode.chunk_encoder`, with gigatoken. Raises Disagreement, at once or from the encoding."""
    reference, fast = plain_tokenizer(tokenizer_file), _load(tokenizer_file)
    known = np.zeros(0x110000, np.bool_)  # characters that were compared
    since, lock = 0, threading.Lock()

    def compare(texts: Texts, numbers: Sequence[int], ids: npt.NDArray[Any], ends: npt.NDArray[np.int64]) -> None:
        """Those of the texts that have these numbers."""
        wanted = [texts.data[texts.offsets[i] : texts.offsets[i + 1]].tobytes().decode() for i in numbers]
        encoded = reference.encode_batch_fast(wanted, add_special_tokens=False)
        for i, text, right in zip(numbers, wanted, encoded, strict=True):
            if ids[ends[i - 1] if i else 0 : ends[i]].tolist() != right.ids:
                raise Disagreement(f"gigatoken and tokenizers return different ids for {text[:80]!r}")

    def encode(chunk: Chunk) -> Encoded:
        nonlocal fast, since
        with lock:
            since += len(chunk.texts.data)
            if since > RESTART_BYTES:
                fast, since = _load(tokenizer_file), 0
            here = fast
        ids, ends = _encode(here, chunk.texts)
        numbers = _sample(chunk.texts)
        compare(chunk.texts, numbers, ids, ends)
        codes = _beyond_ascii(chunk.texts.data)
        fresh = np.unique(codes[~known[codes]])
        others = [form.format(chr(code)) for code in fresh for form in _SURROUNDINGS]
        if not numbers:  # long texts: a whole one would take longer than all the rest
            others.append(chunk.texts.data[:SAMPLE_BYTES].tobytes().decode(errors="ignore"))
        if others:
            compare(Texts.of(others), range(len(others)), *_encode(here, Texts.of(others)))
        known[fresh] = True
        return chunk.encoded(ids, ends, eos_token_id, dtype)

    compare(Texts.of(HOSTILE), range(len(HOSTILE)), *_encode(fast, Texts.of(HOSTILE)))
    return encode


def _load(tokenizer_file: Path) -> Any:
    try:
        import gigatoken

        return gigatoken.Tokenizer.from_json(tokenizer_file.read_bytes())
    except Exception as error:  # Rust's own, or it is not installed
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
    """The characters of UTF-8 `data` that are not ASCII, in order."""
    text = data[data >= 0x80].tobytes().decode()  # all bytes of such a character are
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def _sample(texts: Texts) -> list[int]:
    """Texts to compare, somewhere, of about 4 KB together; none where they are long."""
    start = int.from_bytes(texts.data[-8:].tobytes(), "little") % len(texts)
    end = int(np.searchsorted(texts.offsets, texts.offsets[start] + SAMPLE_BYTES))
    lengths = texts.lengths
    return [i for i in range(start, min(end + 1, len(texts))) if lengths[i] <= 4 * SAMPLE_BYTES]
