"""Rows -> ids, on all cores, in order.

The rows are packed into chunks of one to three million bytes, chunks go to worker processes with a bounded number in
flight, and results are taken in order: the ids are those of the Hugging Face tokenizer row by row, whatever the number
of workers.

A row longer than 64,000 characters is encoded in pieces, since a call of the tokenizer takes a hundred bytes of memory
and more for each character. It is cut only where GPT-2's pre-tokenizer splits for certain, so no id changes:

    's|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+

A match has white space at its start or is nothing else, so one always ends between a character that is not white space
and one that is; and the matches with letters in them end where the letters end. What is before such a place doesn't
matter to what is behind it, nor the other way round. Where a million characters have no such place the row is cut all
the same, and the number of such rows is told.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wikift.base.errors import EnvironmentFault
from wikift.data.store import DTYPES, Encoded
from wikift.data.texts import Texts, count_words

CHUNK_CHARACTERS = 1 << 20  # at least; a reader's batch is not divided
_CALL_BYTES = 1 << 20  # of a chunk that `tokenizers` gets at once
LONG_CHARACTERS = 64_000
HOPELESS_CHARACTERS = 1_000_000
INLINE_CHUNKS = 4  # fewer are done before worker processes would have started

# Before white space; or after a letter and before ASCII or CJK punctuation or a digit. Only characters of which every
# version of Unicode says the same are named, since Python's tables and the tokenizer's may differ.
_LETTERS = (
    r"A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u02af"  # Latin
    r"\u0391-\u03a1\u03a3-\u03a9\u03b1-\u03c9\u0410-\u044f\u05d0-\u05ea\u0627-\u063a"  # Greek, Cyrillic, Hebrew, Arabic
    r"\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"  # kana, Han, Hangul
)
_CJK_MARKS = r"\u3001\u3002\uff01\uff0c\uff1f"
_SAFE_PLACE = re.compile(rf"[!-~{_LETTERS}{_CJK_MARKS}](?=[ \t\n\r])|[{_LETTERS}](?=[!-@\[-`{{-~{_CJK_MARKS}])")
_SEARCH_CHARACTERS = 4096


Ends = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Chunk:
    """Texts to encode each by itself. `ends[i]`: the row ends with text i. `joined`: words that two texts share."""

    texts: Texts
    ends: Ends
    joined: int

    def encoded(self, ids: npt.NDArray[Any], ends: npt.NDArray[np.int64], eos: int | None, dtype: str) -> Encoded:
        """Of the ids of all texts end to end, text i's up to `ends[i]`: with `eos` after each row, and the counts."""
        ids = ids.astype(DTYPES[dtype], copy=False)  # first: what follows is the faster for it
        if eos is not None:
            ids = np.insert(ids, ends[self.ends], eos)
        rows = int(self.ends.sum())
        words = count_words(self.texts) + rows - self.joined
        return Encoded(ids, rows, words, len(self.texts.data))


@dataclass
class Cuts:
    """How many rows were encoded in pieces: at places that change no id, and with one that may."""

    exact: int = 0
    inexact: int = 0
    unsplit: tuple[str, ...] | None = field(default=None)  # added tokens; None: this tokenizer's rows are never cut


def cut_rule(tokenizer_file: Path) -> Cuts:
    """Whether rows may be cut for this tokenizer: only if it splits text as GPT-2's does."""
    content = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    before, added = content.get("pre_tokenizer") or {}, content.get("added_tokens") or []
    alike = (
        content["model"].get("type") == "BPE"
        and content.get("normalizer") is None
        and before.get("type") == "ByteLevel"
        and before.get("use_regex", True)
        and not before.get("add_prefix_space", True)
        and not any(token.get(flag) for token in added for flag in ("lstrip", "rstrip", "single_word"))
    )
    return Cuts(unsplit=tuple(token["content"] for token in added) if alike else None)


def cut_place(text: str, unsplit: tuple[str, ...], low: int, high: int, *, last: bool) -> int:
    """The last (or first) place in `text`, `low < place <= high`, where cutting changes no id; 0 if there is none."""
    high = min(high, len(text) - max(map(len, unsplit), default=1))  # a token begun here could end in what is to come
    starts = range(low, high, _SEARCH_CHARACTERS)
    for start in reversed(starts) if last else starts:
        found = [match.end() for match in _SAFE_PLACE.finditer(text, start, min(start + _SEARCH_CHARACTERS, high) + 1)]
        for place in reversed(found) if last else found:
            near = ((token, text[max(0, place - len(token) + 1) : place + len(token) - 1]) for token in unsplit)
            if place <= high and not any(token in around for token, around in near):
                return place
    return 0


def pieces(texts: Iterable[tuple[str, bool]], cuts: Cuts) -> Iterator[tuple[str, bool, bool]]:
    """(text, ends its row) -> (text, ends its row, shares a word with the next), few longer than 64,000 characters.

    Holds the rest of one row. Counts in `cuts` what it does.
    """
    held: list[str] = []
    exact = inexact = False
    for text, ends in texts:
        if ends and not held and len(text) <= LONG_CHARACTERS:
            yield text, True, False
            continue
        held.append(text)
        del text
        if not ends and (cuts.unsplit is None or sum(map(len, held)) <= LONG_CHARACTERS):
            continue
        rest = "".join(held) if len(held) > 1 else held[0]
        held.clear()
        position = 0
        if cuts.unsplit is not None:
            for place, safe in _places(rest, cuts.unsplit):
                exact, inexact = True, inexact or not safe
                yield rest[position:place], False, not (rest[place - 1].isspace() or rest[place].isspace())
                position = place
        held.append(rest[position:])
        del rest
        if ends:
            yield held.pop(), True, False
            cuts.exact, cuts.inexact = cuts.exact + (exact and not inexact), cuts.inexact + inexact
            exact = inexact = False


def _places(text: str, unsplit: tuple[str, ...]) -> Iterator[tuple[int, bool]]:
    """Where to cut a long text, in order, and whether that changes no id."""
    position = 0
    while len(text) - position > LONG_CHARACTERS:
        soon, late = position + LONG_CHARACTERS, position + HOPELESS_CHARACTERS
        place = cut_place(text, unsplit, position, soon, last=True) or cut_place(text, unsplit, soon, late, last=False)
        if not place and len(text) <= late:
            return
        position = place or late
        yield position, bool(place)


def chunks(batches: Iterable[tuple[Texts, Ends]], cuts: Cuts) -> Iterator[Chunk]:
    """Pack texts, and whether each ends its row, into chunks of a million bytes or more. The last text ends its row."""
    packed: list[tuple[Texts, Ends]] = []
    joined = size = 0
    for texts, ends, shared in _short(batches, cuts):
        packed.append((texts, ends))
        joined += shared
        size += len(texts.data) + 16 * len(texts)  # a row has a cost even if it is blank
        if size >= CHUNK_CHARACTERS:
            yield _chunk(packed, joined)
            packed, joined, size = [], 0, 0
    if packed:
        yield _chunk(packed, joined)


def _chunk(packed: list[tuple[Texts, Ends]], joined: int) -> Chunk:
    return Chunk(Texts.joined([texts for texts, _ in packed]), np.concatenate([ends for _, ends in packed]), joined)


def _short(batches: Iterable[tuple[Texts, Ends]], cuts: Cuts) -> Iterator[tuple[Texts, Ends, int]]:
    """Batches as they are; from one with a long row or the part of a row in it, up to a row's end, by `pieces`."""
    batches = iter(batches)

    def strings(texts: Texts, ends: Ends) -> Iterator[tuple[str, bool]]:
        yield from zip(texts, ends.tolist(), strict=True)
        while not ends[-1]:
            texts, ends = next(batches)
            yield from zip(texts, ends.tolist(), strict=True)

    for texts, ends in batches:
        if not len(texts):
            continue
        if ends.all() and texts.lengths.max() <= LONG_CHARACTERS:
            yield texts, ends, 0
            continue
        for text, end, shared in pieces(strings(texts, ends), cuts):
            yield Texts.of((text,)), np.array([end]), int(shared)


# --- the work ----------------------------------------------------------------------------------------------------


def training_texts(texts: Iterable[tuple[str, bool]], unsplit: str) -> Iterator[str]:
    """The same text in pieces of bounded length, for a tokenizer of GPT-2's kind to be trained on."""
    return (text for text, _, _ in pieces(texts, Cuts(unsplit=(unsplit,))))


Encode = Callable[[Iterable[Chunk]], Iterator[Encoded]]
EncodeChunk = Callable[[Chunk], Encoded]


def chunk_encoder(tokenizer_file: Path, eos_token_id: int | None, dtype: str) -> EncodeChunk:
    """A function that encodes one chunk; `eos_token_id` follows each row unless it is None."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def encode(chunk: Chunk) -> Encoded:
        texts, lists = iter(chunk.texts), []
        for count in np.bincount(chunk.texts.offsets[:-1] // _CALL_BYTES):
            found = tokenizer.encode_batch_fast(list(itertools.islice(texts, count)), add_special_tokens=False)
            lists += [encoding.ids for encoding in found]
        ends = np.cumsum([len(ids) for ids in lists], dtype=np.int64)
        ids = np.fromiter(itertools.chain.from_iterable(lists), np.uint32, ends[-1])
        return chunk.encoded(ids, ends, eos_token_id, dtype)

    return encode


@contextmanager
def encoder(tokenizer_file: Path, *, eos_token_id: int | None, dtype: str, workers: int) -> Iterator[Encode]:
    """Gives a function from chunks to their ids, in order. The `workers` processes are started for long texts only.

    Raises EnvironmentFault where a worker is killed.
    """
    pool: ProcessPoolExecutor | None = None

    def encode(source: Iterable[Chunk]) -> Iterator[Encoded]:
        nonlocal pool
        source = iter(source)
        first = list(itertools.islice(source, INLINE_CHUNKS + 1))
        if pool is None and (workers == 1 or len(first) <= INLINE_CHUNKS):
            with tokenizer_threads(workers > 1):
                yield from map(chunk_encoder(tokenizer_file, eos_token_id, dtype), itertools.chain(first, source))
            return
        if pool is None:
            setup = (tokenizer_file, eos_token_id, dtype)
            pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, setup)
        yield from in_order(pool, _encode_in_worker, itertools.chain(first, source), 2 * workers + 1)

    try:
        yield encode
    except BrokenProcessPool:
        raise EnvironmentFault(
            "a tokenizing process was killed, most likely because memory ran out; nothing was kept. "
            "Run the command again with fewer --workers"
        ) from None
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def in_order(pool: Executor, encode: EncodeChunk, source: Iterable[Chunk], in_flight: int) -> Iterator[Encoded]:
    """The ids of each chunk, `in_flight` of them at most submitted or done."""
    waiting: deque[Future[Encoded]] = deque()
    for chunk in source:
        # A worker starts in submit and inherits the signal mask: Ctrl-C, which a terminal sends to all, is the parent's
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            waiting.append(pool.submit(encode, chunk))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if len(waiting) >= in_flight:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


_encode_chunk: EncodeChunk  # of this worker


def _start_worker(tokenizer_file: Path, eos_token_id: int | None, dtype: str) -> None:
    global _encode_chunk
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _encode_chunk = chunk_encoder(tokenizer_file, eos_token_id, dtype)


def _leave_with_parent() -> None:
    """A killed parent can't stop its workers, which hold each other's pipes open and would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(chunk: Chunk) -> Encoded:
    return _encode_chunk(chunk)


@contextmanager
def tokenizer_threads(on: bool) -> Iterator[None]:
    """Let the tokenizers library use threads for a while, unless the user's TOKENIZERS_PARALLELISM says otherwise.

    Afterwards it is off and not unset: unset, the library warns about every later fork.
    """
    name = "TOKENIZERS_PARALLELISM"
    if name in os.environ and not _threads_are_ours:
        yield
        return
    _threads_are_ours.append(True)
    os.environ[name] = "true" if on else "false"
    try:
        yield
    finally:
        os.environ[name] = "false"


_threads_are_ours: list[bool] = []
