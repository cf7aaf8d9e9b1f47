"""The evaluation protocols of the field by name: which text, in which windows, over what the sum is spread.

    hf-doc   transformers' page "Perplexity of fixed-length models": rows joined by blank lines; windows of 1,024
             tokens, stride 1,024 or 512. A window's first token has nothing before it and is not scored; with a stride
             below the context the page counts one token less per window than it scores, and so does this.
    blocks   run_clm.py: rows tokenized each by itself; disjoint blocks, their first tokens not scored. Nothing of the
             text is dropped, where run_clm drops a remainder of every 1,000 rows.
    knn      neulab/knn-transformers: the same tokens; windows of 1,024, stride 512.
    paper    the GPT-2 paper, as far as it is known: detokenized text, the sum spread over the original words.
    lm-eval  EleutherAI's task wikitext: each page by itself, detokenized, behind an end-of-text token; disjoint
             windows, of which a page's last one is filled up to the left; per word and byte of the original page.
    free     any context and stride: the windows of training's validation, every token but the first is scored.

Windows are made from a stream, so memory is a few windows and a piece of text, whatever the text's length.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from wikift.data.corpus import Corpus
from wikift.data.cuts import Cuts, cut_place, cut_rule, pieces
from wikift.data.store import TokenStore
from wikift.evaluation.detokenize import Part
from wikift.evaluation.documents import Counts, is_title, joined_pages, joined_rows, page_texts, row_texts

CONTEXT = 1024  # of every published protocol
_ENCODED_TOGETHER = 1 << 16  # characters
_STORE_PIECE = 1 << 16  # tokens
_TITLE_TOKENS = 400


@dataclass(frozen=True)
class Protocol:
    """`strides` are for a context of 1,024. `extra`: tokens that a window reads beyond its context, to predict them."""

    name: str
    texts: Callable[[Corpus, str, Counts], Iterator[Part]]
    strides: tuple[int, ...]
    normalisers: tuple[str, ...]
    extra: int = 0
    from_store: bool = False  # the text's rows, which a token store holds in tokens
    counts_like_the_page: bool = False
    by_page: bool = False  # each document by itself, behind an end-of-text token, its last window filled to the left


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("hf-doc", joined_rows, (1024, 512), ("tokens",), counts_like_the_page=True),
        Protocol("blocks", row_texts, (1024,), ("tokens", "words"), from_store=True),
        Protocol("knn", row_texts, (512,), ("tokens", "words"), from_store=True),
        Protocol("paper", joined_pages, (1024,), ("words",), extra=1),
        Protocol("lm-eval", page_texts, (1024,), ("words", "bytes", "bits/byte"), extra=1, by_page=True),
        Protocol("free", row_texts, (1024,), ("tokens", "words", "bits/byte"), extra=1, from_store=True),
    )
}


class Piece(NamedTuple):
    """Ids (n,) of one document, in order; `ends`: the unit ends with it."""

    ids: np.ndarray
    ends: bool
    document: int


class Window(NamedTuple):
    """Ids (n,), those from index `first` on to be predicted, with their documents (n,); each counts `weight`."""

    ids: np.ndarray
    documents: np.ndarray
    first: int
    weight: float


# --- text to ids -------------------------------------------------------------------------------------------------


def encoded(texts: Iterable[Part], tokenizer_file: Path, eos_token_id: int | None) -> Iterator[Piece]:
    """The ids of each unit, as the tokenizer gives them for the whole of it; `eos_token_id` follows unless None."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    waiting: list[Part] = []
    size = 0

    def flush() -> Iterator[Piece]:
        found = tokenizer.encode_batch_fast([text for text, _, _ in waiting], add_special_tokens=False)
        for encoding, (_, ends, document) in zip(found, waiting, strict=True):
            ids = encoding.ids if eos_token_id is None or not ends else [*encoding.ids, eos_token_id]
            yield Piece(np.array(ids, np.int64), ends, document)

    for part in _cut_at_documents(texts, cut_rule(tokenizer_file)):
        waiting.append(part)
        size += len(part[0]) + 16
        if size >= _ENCODED_TOGETHER:
            yield from flush()
            waiting, size = [], 0
    yield from flush()


def _cut_at_documents(texts: Iterable[Part], cuts: Cuts) -> Iterator[Part]:
    """Units in pieces that change no id; one is cut at the last such place before a document that begins inside."""
    starts: deque[tuple[int, int]] = deque()

    def without_documents() -> Iterator[tuple[str, bool]]:
        position, before = 0, -1
        for text, ends, document in texts:
            if document != before:
                starts.append((position, document))
            position, before = position + len(text), document
            yield text, ends

    at = now = 0
    for text, ends, _ in pieces(without_documents(), cuts):
        while starts and starts[0][0] < at + max(1, len(text)):
            start, document = starts.popleft()
            if start > at and cuts.unsplit is not None:
                place = cut_place(text, cuts.unsplit, 0, start - at, last=True)
                if place:
                    yield text[:place], False, now
                    text, at = text[place:], at + place
            now = document
        yield text, ends, now
        at += len(text)


def stored(store: TokenStore, split: str) -> Iterator[Piece]:
    """The ids of a store's split, cut where documents begin as far as the tokens tell."""
    ids = store.tokens(split)
    starts = deque(_document_starts(store, split))
    begin = document = 0
    while begin < len(ids):
        end = min(begin + _STORE_PIECE, len(ids), starts[0] if starts else len(ids))
        yield Piece(ids[begin:end].astype(np.int64), end == len(ids), document)
        if starts and end == starts[0]:
            document += 1
            starts.popleft()
        begin = end


def _document_starts(store: TokenStore, split: str) -> list[int]:
    """Where documents but the first begin: behind end-of-text tokens where rows have them, else at WikiText's titles.

    Finds none, so that all is one document, where there is no tokenizer that could tell a title.
    """
    ids = store.tokens(split)
    if store.record.get("append_eos"):
        ends = np.concatenate([np.flatnonzero(part == store.eos_token_id) + at for at, part in _parts(ids)])
        return [int(end) + 1 for end in ends if end + 1 < len(ids)]
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(store.path / "tokenizer" / "tokenizer.json"))
    except Exception:  # the library knows no class of its own for what it can't read
        return []
    vocabulary = tokenizer.get_vocab()  # of a byte-level BPE: \u010a is a line end, \u0120 a space
    line_ends = np.array([i for token, i in vocabulary.items() if token.endswith("\u010a")], np.int64)
    signs = np.array([i for token, i in vocabulary.items() if token.lstrip("\u0120").startswith("=")], np.int64)
    starts = []
    for at, part in _parts(ids):
        for begin in np.flatnonzero(np.isin(part, line_ends)) + at + 1:
            if begin < len(ids) and ids[begin] in signs:
                line = ids[begin : begin + _TITLE_TOKENS].astype(np.int64)
                ends = np.flatnonzero(np.isin(line, line_ends))
                if len(ends) and is_title(tokenizer.decode(line[: ends[0] + 1].tolist(), skip_special_tokens=False)):
                    starts.append(int(begin))
    before = ids[: starts[0]].tolist() if starts and starts[0] < _TITLE_TOKENS else [0]
    return starts[1:] if starts and not tokenizer.decode(before).strip() else starts


def _parts(ids: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    return ((at, ids[at : at + (1 << 20)]) for at in range(0, max(len(ids), 1), 1 << 20))


# --- ids to windows ----------------------------------------------------------------------------------------------


def protocol_windows(
    protocol: Protocol, source: Iterator[Piece], *, context: int, stride: int, eos_token_id: int
) -> Iterator[Window]:
    """The windows of `protocol` over all of `source`."""
    if not protocol.by_page:
        yield from rolled(source, context + protocol.extra, stride, like_the_page=protocol.counts_like_the_page)
        return
    for first in source:  # of a unit; the rest of it is taken inside
        unit = itertools.chain((first,), () if first.ends else _to_its_end(source))
        begin = Piece(np.array([eos_token_id]), False, first.document)
        yield from rolled(itertools.chain((begin,), unit), context + protocol.extra, stride, fill=True)


def _to_its_end(source: Iterator[Piece]) -> Iterator[Piece]:
    for piece in source:
        yield piece
        if piece.ends:
            return


def rolled(
    source: Iterable[Piece], width: int, stride: int, *, fill: bool = False, like_the_page: bool = False
) -> Iterator[Window]:
    """Windows of `width` ids, `stride` apart. Each predicts what none before it has, save its own first id.

    The last one is shorter; with `fill` it begins earlier instead. `like_the_page`: see hf-doc above.
    """
    pieces = iter(source)
    ids = documents = np.empty(0, np.int64)
    at = begin = done = 0  # of the whole: where `ids` begins, where the window does, how much has been predicted
    while True:
        more = []
        there = at + len(ids)
        while there <= begin + width and (piece := next(pieces, None)) is not None:  # one more tells if it is the last
            more.append(piece)
            there += len(piece.ids)
        if more:
            ids = np.concatenate([ids, *(piece.ids for piece in more)])
            documents = np.concatenate([documents, *(np.full(len(p.ids), p.document, np.int64) for p in more)])
        end = min(begin + width, there)
        last = end == there
        start = max(0, end - width) if fill and last else begin
        first = max(done, start + 1)
        if first < end:
            weight = (end - done - 1) / (end - first) if like_the_page else 1.0
            yield Window(ids[start - at : end - at], documents[start - at : end - at], first - start, weight)
        if last:
            return
        done, begin = end, begin + stride
        keep = max(0, begin - width - at)  # a filled window reaches so far back
        ids, documents, at = ids[keep:], documents[keep:], at + keep
