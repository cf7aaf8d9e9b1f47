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
from wikift.data.corpus import Corpus
from wikift.evaluation.detokenize import Part
from wikift.evaluation.documents import Counts, joined_pages, joined_rows, page_texts, row_texts
from wikift.evaluation.score import Piece, Score, Window, document_sums, stored, windows
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


@dataclass(frozen=True)
class Setup:
    """One protocol for one model. `scaled`: the model is too small for the protocol's windows."""

    protocol: Protocol
    context: int
    stride: int
    scaled: bool


def setups(protocol: Protocol, positions: int, context: int | None, stride: int | None) -> list[Setup]:
    """One for each of the protocol's strides, in proportion where the context is not 1,024; None is the protocol's."""
    every = protocol.by_page or protocol.name == "free"  # these use the model's whole context, whatever it is
    size = context or (positions if every else min(CONTEXT, positions))
    strides = dict.fromkeys(max(1, own * size // CONTEXT) for own in protocol.strides)
    scaled = context is None and size < CONTEXT and protocol.name != "free"
    return [Setup(protocol, size, min(own, size), scaled) for own in ([stride] if stride is not None else strides)]


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
    import torch
    from transformers.utils import logging as transformers_logging

    from wikift.data import tokenizer
    from wikift.model.gpt2 import DTYPES, NextTokenLoss, load_model, resolve_precision

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    model = load_model(source, world.device, "MODEL", say)
    if Path(source).is_dir():
        tokenizer.tokenizer_fingerprint(source, setting="MODEL")  # raises for a broken one, in the user's terms
    chosen = precision
    if precision == "auto":
        chosen = next((name for name, dtype in DTYPES.items() if dtype == model.config.dtype), "fp32")
    if resolve_precision(chosen, world.device).warning:
        why = ", that of the stored weights," if precision == "auto" else ""
        say(f"{source}: {chosen}{why} is slow on this device; --precision fp32 is faster")
    losses = NextTokenLoss(model, chosen)

    def by_token(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.inference_mode():
            return losses.by_token(inputs.to(world.device), targets.to(world.device))

    with tempfile.TemporaryDirectory(prefix="wikift-tokenizer-") as folder:
        yield Scorer(by_token, model.config.n_positions, chosen, tokenizer.load_tokenizer(source, Path(folder)))


def measure(
    scorer: Scorer, text: Text, split: str, setup: Setup, *, batch: int, world: World, progress: Callable[[float], None]
) -> Score:
    """One model, one split, one protocol; collective. `progress` is told the part of the text that has been read.

    Raises UserError where there is nothing to score.
    """
    protocol, counts, eos = setup.protocol, Counts(), scorer.tokenizer.eos_token_id
    store = text.store if protocol.from_store else None
    if store is not None:
        source, size = stored(store.tokens(split), document_starts(store, split)), store.splits[split].tokens
    else:
        assert text.corpus is not None
        ends_rows = protocol.from_store and text.corpus.rows_are_documents
        texts = protocol.texts(text.corpus, split, counts)
        source = encoded(texts, scorer.tokenizer.file, eos if ends_rows else None)
        size = text.corpus.sizes[split] or 0

    def tell(done: int) -> None:
        progress((sum(counts.tokens) if store is not None else counts.bytes_read) / size if size else 0.0)

    made = protocol_windows(setup, _counted(source, counts), eos)
    nll, scored = document_sums(scorer.losses, made, batch=batch, world=world, progress=tell)
    if not scored.sum():
        raise UserError(f"--split {split}: {text.name} has no token to predict in it; use another")
    tokens, *units = (np.array(part, np.float64) for part in (counts.tokens, counts.words, counts.bytes))
    if store is not None:  # tokens do not tell which words are in which document: in proportion
        facts = store.splits[split]
        units = [tokens * (total / tokens.sum()) for total in (facts.words, facts.bytes)]
    nll, scored = (np.pad(part, (0, len(tokens) - len(part))) for part in (nll, scored))
    return Score(nll, scored, tokens, *units)


def _counted(source: Iterator[Piece], counts: Counts) -> Iterator[Piece]:
    for piece in source:
        for document, number in zip(*np.unique(piece.documents, return_counts=True), strict=True):
            counts.add(int(document), token_count=int(number))
        yield piece


def protocol_windows(setup: Setup, source: Iterator[Piece], eos_token_id: int) -> Iterator[Window]:
    """The windows of a protocol over all of `source`."""
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
