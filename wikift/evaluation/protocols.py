"""The evaluation protocols of the field by name: which text, in which windows, averaged over what.

docs/explanation/evaluation.md describes them; `make test-agreement` compares with the originals.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from wikift.base.errors import UserError
from wikift.base.hub import quiet_libraries
from wikift.data.corpus import Corpus
from wikift.evaluation.documents import Counts, Part, joined_pages, joined_rows, page_texts, row_texts
from wikift.evaluation.score import Piece, Score, Window, document_sums, stored, too_short, windows
from wikift.evaluation.text import Text, document_starts, encoded

if TYPE_CHECKING:
    from torch import Tensor

    from wikift.base.world import World
    from wikift.data.tokenizer import SavedTokenizer

CONTEXT = 1024  # of every published protocol


@dataclass(frozen=True)
class Protocol:
    """`strides` are for a context of 1,024. `extra`: tokens that a window reads beyond its context, to predict them."""

    name: str
    texts: Callable[[Corpus, str, Counts], Iterator[Part]]
    strides: tuple[int, ...]
    normalisers: tuple[str, ...]
    extra: int = 0
    from_store: bool = False  # the text's rows, which a token store holds in tokens
    # transformers' page counts one token less per window than it scores where windows overlap
    counts_like_the_page: bool = False
    by_page: bool = False  # each document by itself, after an end-of-text token, its last window filled to the left


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


@dataclass(frozen=True)
class Setup:
    """One protocol for one model, with the `index`-th of its strides. `scaled`: the model's context is below 1,024."""

    protocol: Protocol
    index: int
    context: int
    stride: int
    scaled: bool


def setups(protocol: Protocol, positions: int, context: int | None, stride: int | None) -> list[Setup]:
    """One for each of the protocol's strides, in proportion where the context is not 1,024; None is the protocol's."""
    every = protocol.by_page or protocol.name == "free"  # these use the model's whole context, whatever it is
    size = context or (positions if every else min(CONTEXT, positions))
    strides = [stride] if stride is not None else [max(1, own * size // CONTEXT) for own in protocol.strides]
    scaled = context is None and size < CONTEXT and protocol.name != "free"
    return [Setup(protocol, index, size, min(own, size), scaled) for index, own in enumerate(dict.fromkeys(strides))]


@dataclass(frozen=True)
class Scorer:
    """A loaded model as the function that `document_sums` takes, and its tokenizer."""

    losses: Callable[[Tensor, Tensor], Tensor]
    positions: int
    precision: str
    tokenizer: SavedTokenizer


@contextmanager
def loaded_scorer(source: str, precision: str, world: World, say: Callable[[str], None]) -> Iterator[Scorer]:
    """Load a model by folder or name, and its tokenizer into a folder that is removed at the end.

    Matmuls are in `precision`; "auto" is that of the stored weights, as lm_eval's is: a faster one changes the fourth
    digit of a perplexity.
    """
    from wikift.data.tokenizer import load_tokenizer
    from wikift.model.gpt2 import DTYPES, NextTokenLoss, load_model, resolve_precision

    quiet_libraries()
    model = load_model(source, world.device, "MODEL", say)
    stored_in = next((name for name, dtype in DTYPES.items() if dtype == model.config.dtype), "fp32")
    chosen = stored_in if precision == "auto" else precision
    if resolve_precision(chosen, world.device).warning:
        say(f"{source}: {chosen} is slow on this device; --precision fp32 is faster")
    with tempfile.TemporaryDirectory(prefix="wikift-tokenizer-") as folder:
        saved = load_tokenizer(source, Path(folder), "MODEL")
        yield Scorer(NextTokenLoss(model, chosen).by_token, model.config.n_positions, chosen, saved)


def measure(
    scorer: Scorer, text: Text, split: str, setup: Setup, *, batch: int, world: World, progress: Callable[[float], None]
) -> Score:
    """One model, one split, one protocol; collective. `progress` gets the part of the text that has been read.

    Raises UserError where there is nothing to score.
    """
    protocol, counts, eos = setup.protocol, Counts(), scorer.tokenizer.eos_token_id
    if text.store is not None and protocol.from_store:
        facts = text.store.splits[split]
        source = stored(text.store.tokens(split), document_starts(text.store, split))
        read, size = counts.tokens, facts.tokens
    else:
        assert text.corpus is not None
        facts = None
        ends_rows = protocol.from_store and text.corpus.rows_are_documents
        texts = protocol.texts(text.corpus, split, counts)
        source = encoded(texts, scorer.tokenizer.file, eos if ends_rows else None)
        read, size = counts.bytes, text.corpus.sizes[split] or 0

    def tell(done: int) -> None:
        progress(read.total() / size if size else 0.0)

    made = protocol_windows(setup, _counted(source, counts), eos)
    nll, scored = document_sums(scorer.losses, made, batch=batch, world=world, progress=tell)
    if not scored.sum():
        raise UserError(too_short(split, text.name))
    columns, size = (counts.tokens, counts.words, counts.bytes), max([*counts.tokens, *counts.words]) + 1
    tokens, *units = (np.array([column[document] for document in range(size)], np.float64) for column in columns)
    if facts is not None:  # tokens do not tell which words are in which document: in proportion
        units = [tokens * (total / tokens.sum()) for total in (facts.words, facts.bytes)]
    nll, scored = (np.pad(sums, (0, size - len(sums))) for sums in (nll, scored))
    return Score(nll, scored, tokens, *units)


def _counted(source: Iterator[Piece], counts: Counts) -> Iterator[Piece]:
    for piece in source:
        numbers, sizes = np.unique(piece.documents, return_counts=True)
        counts.tokens.update(dict(zip(numbers.tolist(), sizes.tolist(), strict=True)))
        yield piece


def protocol_windows(setup: Setup, source: Iterator[Piece], eos_token_id: int) -> Iterator[Window]:
    protocol, width = setup.protocol, setup.context + setup.protocol.extra
    if not protocol.by_page:
        yield from windows(source, width, setup.stride, like_the_page=protocol.counts_like_the_page)
        return
    begin = Piece(np.array([eos_token_id]), np.zeros(1, np.int64), False)  # never predicted: of no document
    for first in source:  # of a unit; the rest of it is read inside
        unit = itertools.chain((begin, first), () if first.ends else _to_its_end(source))
        yield from windows(unit, width, setup.stride, fill=True)


def _to_its_end(source: Iterator[Piece]) -> Iterator[Piece]:
    for piece in source:
        yield piece
        if piece.ends:
            return
