"""Perplexity from one summed negative log-likelihood: pieces of ids -> windows -> batches -> sums by document.

A window reads `width` ids, begins `stride` after the previous one, and predicts the ids that no earlier window has
predicted, except its own first one. With a width of context + 1, each id but the very first is scored once;
where the stride is the context too, these are training's validation and the disjoint blocks of `run_clm.py`.
Cost: context / stride forwards per token. Memory is one batch of windows and a piece, whatever the text's length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from wikift.data.store import Split

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from wikift.base.world import World

IGNORED = -100  # target of a position that is not scored: torch's and transformers' ignore_index
_PIECE_TOKENS = 1 << 16


class Piece(NamedTuple):
    """Ids (n,) in order and the documents (n,) that they are of; `ends`: a unit of text ends with it."""

    ids: np.ndarray
    documents: np.ndarray
    ends: bool


class Window(NamedTuple):
    """Ids (n,), those from index `first` on to be predicted, with their documents (n,); each counts `weight`."""

    ids: np.ndarray
    documents: np.ndarray
    first: int
    weight: float


@dataclass(frozen=True)
class Score:
    """One model's likelihood of one text: float64 (documents,) each.

    `nll` in nats over `scored` tokens (where a protocol counts other tokens than it scores, both are of its count),
    `tokens` of the text, scored or not; `words` and UTF-8 `bytes` as the protocol counts them.
    """

    nll: np.ndarray
    scored: np.ndarray
    tokens: np.ndarray
    words: np.ndarray
    bytes: np.ndarray

    @property
    def loss(self) -> float:
        """Nats per scored token."""
        return float(self.nll.sum() / self.scored.sum())

    def spread(self, normaliser: str) -> tuple[np.ndarray, np.ndarray]:
        """(nats, or bits for bits/byte, and units) by document; the quotient of their sums is ln(perplexity), or bits.

        Per word and byte, a token that is not scored counts as the mean of the others (openai/gpt-2#78), so that the
        numbers of two tokenizers can be compared.
        """
        if normaliser == "tokens":
            return self.nll, self.scored
        nats = self.nll / self.scored.sum() * self.tokens.sum()
        units = self.words if normaliser == "words" else self.bytes
        return (nats / math.log(2) if normaliser == "bits/byte" else nats), units

    def value(self, normaliser: str) -> float:
        """Perplexity per token, word or byte ("tokens", "words", "bytes"), or "bits/byte"; nan without such units."""
        nats, units = (float(part.sum()) for part in self.spread(normaliser))
        if not units:
            return math.nan
        if normaliser == "bits/byte":
            return nats / units
        return math.exp(nats / units) if nats / units < 700 else math.inf


def difference(one: Score, other: Score, normaliser: str) -> tuple[float, float]:
    """How much larger ln(perplexity) (or bits/byte) of `other` is, and the standard error of that over the documents.

    The error is the ratio estimator's (Cochran, Sampling Techniques, 6.19), nan where there are not two documents.
    """
    mean, parts = 0.0, np.zeros(len(one.nll))
    for sign, (nats, units) in ((-1, one.spread(normaliser)), (1, other.spread(normaliser))):
        total = float(units.sum())
        if not total:
            return math.nan, math.nan
        own = float(nats.sum()) / total
        mean += sign * own
        parts += sign * (nats - own * units) / total
    count = int(np.count_nonzero(one.spread(normaliser)[1]))
    return mean, math.sqrt(count / (count - 1) * float((parts**2).sum())) if count > 1 else math.nan


def score_split(
    nll: Callable[[Tensor, Tensor], Tensor],
    ids: np.ndarray,
    split: Split,
    *,
    context: int,
    batch: int,
    world: World,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Score:
    """Score `ids`, all of a store's `split` or its beginning, in disjoint windows; every rank returns the same Score.

    `nll(inputs, targets)` takes int64 CPU tensors (batch, context) and returns the float64 sum over the scored targets.
    It may be collective: every rank calls it equally often. `progress(done, of)` counts windows.
    """
    number = -(-(len(ids) - 1) // context)
    made = windows(stored(ids), context + 1, context)
    sums = document_sums(nll, made, batch=batch, world=world, width=context, progress=lambda n: progress(n, number))
    return Score(*sums, *(np.array([count], np.float64) for count in (split.tokens, split.words, split.bytes)))


def too_short(split: str, text: str) -> str:
    return f"--split {split}: {text} has fewer than two tokens there, so none to predict; use another split"


def stored(ids: np.ndarray, starts: Sequence[int] = ()) -> Iterator[Piece]:
    """A store's ids in pieces, as documents of which all but the first begin at `starts`."""
    for begin in range(0, len(ids), _PIECE_TOKENS):
        part = ids[begin : begin + _PIECE_TOKENS]
        end = begin + len(part)
        yield Piece(part, np.searchsorted(starts, np.arange(begin, end), "right"), end == len(ids))


def windows(
    source: Iterable[Piece], width: int, stride: int, *, fill: bool = False, like_the_page: bool = False
) -> Iterator[Window]:
    """The windows with something to predict. The last one is shorter; with `fill` it begins earlier instead.

    `like_the_page`: windows count one token less than they score where they overlap, see protocols' hf-doc.
    """
    pieces = iter(source)
    ids = documents = np.empty(0, np.int64)
    at = begin = done = 0  # of the text: where `ids` begins, where the window does, how much has been predicted
    while True:
        # one token more tells whether this window is the last
        while at + len(ids) <= begin + width and (piece := next(pieces, None)) is not None:
            ids, documents = np.append(ids, piece.ids), np.append(documents, piece.documents)
        known = at + len(ids)
        end = min(begin + width, known)
        last = end == known
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


def document_sums(
    losses: Callable[[Tensor, Tensor], Tensor],
    source: Iterable[Window],
    *,
    batch: int,
    world: World,
    width: int | None = None,
    progress: Callable[[int], None],
) -> np.ndarray:
    """Nats and scored tokens by document, float64 (2, documents), the same on every rank; collective.

    Every rank reads all of `source` and scores its share of each `batch * world.size` windows. `losses(inputs,
    targets)` takes int64 CPU tensors (M, L) and returns the loss of each position (M * L,), 0 where `IGNORED`; or
    the sum of all, (), which is taken as the first document's. With a `width`, every rank calls it equally often, each
    time on `batch` windows of that length; without one, on what windows it has. `progress` counts windows.
    """
    import torch

    sums = np.zeros((2, 1))
    total = torch.zeros((), dtype=torch.float64, device=world.device)  # added up there: a GPU is not waited for
    unread, done = iter(source), 0
    while group := list(islice(unread, batch * world.size)):
        own = group[world.rank :: world.size]
        sums = np.pad(sums, ((0, 0), (0, max(0, int(group[-1].documents[-1]) + 1 - sums.shape[1]))))
        if own or width:
            longest = max((len(window.ids) - 1 for window in own), default=0)
            inputs, targets, documents, weights = _padded(own, batch if width else len(own), width or longest)
            loss = losses(*(_for_copy(torch.from_numpy(ids), world.device) for ids in (inputs, targets)))
            if loss.ndim:
                sums[0] += np.bincount(documents, loss.double().cpu().numpy() * weights, sums.shape[1])
            else:
                total += loss.to(total)
            sums[1] += np.bincount(documents, weights, sums.shape[1])
        done += len(group)
        progress(done)
    sums[0, 0] += float(total)
    return world.total(torch.from_numpy(sums)).numpy()


def _for_copy(ids: Tensor, device: torch.device) -> Tensor:
    """`ids` in pinned memory where they go to a GPU: it is not waited for, and the next windows are made meanwhile."""
    return ids.pin_memory() if device.type == "cuda" else ids


def _padded(group: list[Window], rows: int, width: int) -> tuple[np.ndarray, ...]:
    """Inputs and targets, int64 (rows, width); each target's document and weight, 0 if not scored, (rows * width,)."""
    inputs, documents, weights = (np.zeros((rows, width), dtype) for dtype in (np.int64, np.int64, np.float64))
    targets = np.full((rows, width), IGNORED, np.int64)
    for row, window in enumerate(group):
        size = len(window.ids) - 1
        scored = slice(window.first - 1, size)
        inputs[row, :size] = window.ids[:-1]
        targets[row, scored] = window.ids[window.first :]
        documents[row, scored], weights[row, scored] = window.documents[window.first :], window.weight
    return inputs, targets, documents.ravel(), weights.ravel()
