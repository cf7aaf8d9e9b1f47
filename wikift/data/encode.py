"""Rows -> ids, on all cores, in order.

The rows are packed into chunks of one to three million bytes, chunks go to threads with a bounded number in flight, as
all the work in them is done without Python's lock, and results are taken in order: the ids are those of the Hugging
Face tokenizer row by row, whatever the number of threads.

Long rows are cut, as a call of `tokenizers` takes 100 bytes and more for each character: only for tokenizers that split
text as GPT-2's does, and only where they split it for certain:

    's|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+

A match has white space at its start or is nothing else, so one ends wherever white space follows another character. A
stretch without white space stays in one piece. As words end there too, their number is the sum over the pieces.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wikift.base import hub
from wikift.data.store import DTYPES, Encoded
from wikift.data.texts import Texts, count_words

CHUNK_CHARACTERS = 1 << 20  # at least; a reader's batch is not divided
_CALL_BYTES = 1 << 20  # of a chunk that `tokenizers` gets at once
LONG_CHARACTERS = 64_000
_CUT = re.compile(r"\S(?=[ \t\n\r])")


@dataclass(frozen=True)
class Chunk:
    """Texts to encode each by itself. `ends[i]`: the row ends with text i; the next text is its next piece if not."""

    texts: Texts
    ends: npt.NDArray[np.bool_]

    def encoded(self, ids: npt.NDArray[Any], ends: npt.NDArray[np.int64], eos: int | None, dtype: str) -> Encoded:
        """Of the ids of all texts end to end, text i's up to `ends[i]`: with `eos` after each row, and the counts.

        A row that ends in `eos` of its own gets no second one.
        """
        ids = ids.astype(DTYPES[dtype], copy=False)  # first: what follows is the faster for it
        if eos is not None:
            own = np.diff(ends, prepend=0) > 0
            own[own] = ids[ends[own] - 1] == eos
            ids = np.insert(ids, ends[self.ends & ~own], eos)
        rows = int(self.ends.sum())
        return Encoded(ids, rows, count_words(self.texts) + rows, len(self.texts.data))


def chunks(batches: Iterable[Texts], *, cut: bool) -> Iterator[Chunk]:
    """Pack rows into chunks of a million bytes or more; `cut`: long rows in pieces."""
    packed, ends, size = list[Texts](), list[npt.NDArray[np.bool_]](), 0
    for texts, of_texts in _parts(batches, cut):
        packed.append(texts)
        ends.append(of_texts)
        size += len(texts.data) + 16 * len(texts)  # a row has a cost even if it is blank
        if size >= CHUNK_CHARACTERS:
            yield Chunk(Texts.joined(packed), np.concatenate(ends))
            packed, ends, size = [], [], 0
    if size:
        yield Chunk(Texts.joined(packed), np.concatenate(ends))


def _parts(batches: Iterable[Texts], cut: bool) -> Iterator[tuple[Texts, npt.NDArray[np.bool_]]]:
    for texts in batches:
        if cut and texts.lengths.max(initial=0) > LONG_CHARACTERS:
            for text, ends in pieces((text, True) for text in texts):
                yield Texts.of((text,)), np.array([ends])
        else:
            yield texts, np.ones(len(texts), np.bool_)


EncodeChunk = Callable[[Chunk], Encoded]


def plain_tokenizer(file: Path) -> Any:
    """The Rust tokenizer in `file`, to encode whole texts in this thread; TOKENIZERS_PARALLELISM lets it use more."""
    from tokenizers import Tokenizer

    hub.keep_tokenizers_to_one_thread()
    tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def chunk_encoder(tokenizer_file: Path, eos_token_id: int | None, dtype: str) -> EncodeChunk:
    """A function that encodes one chunk; `eos_token_id` follows each row unless it is None."""
    tokenizer = plain_tokenizer(tokenizer_file)

    def encode(chunk: Chunk) -> Encoded:
        texts, ids = iter(chunk.texts), []
        for count in np.bincount(chunk.texts.offsets[:-1] // _CALL_BYTES):
            encodings = tokenizer.encode_batch_fast(list(itertools.islice(texts, count)), add_special_tokens=False)
            ids += [np.array(encoding.ids, np.uint32) for encoding in encodings]
        return chunk.encoded(np.concatenate(ids), np.cumsum([len(i) for i in ids]), eos_token_id, dtype)

    return encode


def encode_all(chunks: Iterable[Chunk], encode: EncodeChunk, workers: int) -> Iterator[Encoded]:
    """The ids of each chunk, in order, by `workers` threads; twice as many chunks and one are submitted or done."""
    waiting: deque[Future[Encoded]] = deque()
    pool = ThreadPoolExecutor(workers, "encode")
    try:
        for chunk in chunks:
            waiting.append(pool.submit(encode, chunk))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


# --- pieces of rows -----------------------------------------------------------------------------------------------


def splits_at_spaces(tokenizer_file: Path) -> bool:
    """Whether a row may be cut before white space for this tokenizer: only if it splits text as GPT-2's does."""
    content = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    before, added = content.get("pre_tokenizer") or {}, content.get("added_tokens") or []
    return bool(
        content["model"].get("type") == "BPE"
        and content.get("normalizer") is None
        and before.get("type") == "ByteLevel"
        and before.get("use_regex", True)
        and not before.get("add_prefix_space", True)
        and not any(token.get(flag) for token in added for flag in ("lstrip", "rstrip", "single_word"))
        and not any(re.search(r"\s", token["content"]) for token in added)
    )


def pieces(texts: Iterable[tuple[str, bool]], *, cut: bool = True) -> Iterator[tuple[str, bool]]:
    """(text, ends its unit) -> (text, ends its unit): units in one piece each, or cut after 64,000 characters or more.

    Holds one piece and one text; a whole unit where nothing is to be cut.
    """
    held: list[str] = []
    size = 0
    for text, ends in texts:
        held.append(text)
        size += len(text)
        if cut and size > LONG_CHARACTERS:
            joined, start = "".join(held), 0
            while match := _CUT.search(joined, start + LONG_CHARACTERS - 1):
                yield joined[start : match.end()], False
                start = match.end()
            held = [joined[start:]]
            size = len(held[0])
        if ends:
            yield "".join(held), True
            held, size = [], 0
