"""Perplexity of a model on one split of a token store, from one summed negative log-likelihood.

Window i reads `context` tokens from token `i * stride` on and scores its last `stride` targets: those that no window
before it has scored. The first window scores all of its targets, so every token but the very first of the split is
scored exactly once. Equal context and stride are the disjoint blocks of `run_clm.py`; stride 512 of context 1024 is
neulab/knn-transformers' protocol.
Cost: `context / stride` forwards per token; memory is one micro-batch, whatever the split.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from wikift.base.errors import UserError
from wikift.data.store import TokenStore

if TYPE_CHECKING:
    from torch import Tensor

    from wikift.base.world import World
    from wikift.evaluation.protocols import Window

IGNORED = -100  # target of a position that is not scored: torch's and transformers' ignore_index


@dataclasses.dataclass(frozen=True)
class Score:
    """One model's likelihood of one split. `nll` is in nats, summed over `tokens` scored tokens.

    `words` counts one end of line per row, as the papers on WikiText do; `bytes` are UTF-8. Both are of the whole
    split, so that the numbers of two tokenizers can be compared: the loss per token times tokens per word, where the
    split's first token, which nothing predicts, counts as one more of the mean (openai/gpt-2#78).
    """

    nll: float
    tokens: int
    words: int
    bytes: int
    context: int
    stride: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        """Per token of this tokenizer."""
        return exp(self.nll / self.tokens)

    @property
    def word_perplexity(self) -> float:
        """Per word: perplexity ** (tokens / words)."""
        return exp(self.loss * (self.tokens + 1) / self.words) if self.words else math.nan

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of UTF-8 text."""
        return self.loss * (self.tokens + 1) / math.log(2) / self.bytes if self.bytes else math.nan


def window_count(tokens: int, context: int, stride: int) -> int:
    """How many windows score all targets of a split of `tokens` tokens."""
    targets = max(tokens - 1, 0)
    return min(targets, 1) + max(0, math.ceil((targets - context) / stride))


def windows(tokens: np.ndarray, indices: np.ndarray, *, context: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """The windows `indices` (M,) of the ids `tokens` (N,) -> inputs and targets, int64 (M, context).

    Targets that an earlier window scores, and those past the end, are `IGNORED`; inputs past the end are 0. An index
    past the last window gives a window with nothing to score.
    """
    start = indices.astype(np.int64)[:, None] * stride
    position = start + np.arange(context + 1)  # (M, context + 1)
    there = position < len(tokens)
    ids = tokens[np.where(there, position, 0)].astype(np.int64)
    ids[~there] = 0
    new = (start == 0) | (np.arange(context) >= context - stride)  # (M, context)
    return ids[:, :-1], np.where(new & there[:, 1:], ids[:, 1:], IGNORED)


def score_split(
    nll: Callable[[Tensor, Tensor], Tensor],
    store: TokenStore,
    split: str,
    *,
    context: int,
    stride: int,
    batch: int,
    world: World,
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """Score `split` with all ranks together; every rank returns the same Score.

    `nll(inputs, targets)` takes int64 CPU tensors (M, context) and returns the float64 sum over the scored targets,
    exactly 0 where there are none. It may be collective: every rank calls it equally often, on `batch` windows each
    time. `progress(done, all)` counts windows. Raises UserError where the split has nothing to score.
    """
    import torch

    ids = store.tokens(split)
    if len(ids) < 2:
        raise UserError(f"--split {split}: has {len(ids)} tokens, so no token to predict; name another split")
    count = window_count(len(ids), context, stride)
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for first in range(0, count, batch * world.size):
        mine = first + world.rank + world.size * np.arange(batch)
        inputs, targets = windows(ids, mine, context=context, stride=stride)
        total += nll(torch.from_numpy(inputs), torch.from_numpy(targets)).to(total)
        if progress is not None:
            progress(min(first + batch * world.size, count), count)
    found = store.splits[split]
    return Score(float(world.total(total)), len(ids) - 1, found.words, found.bytes, context, stride)


def exp(nats: float) -> float:
    """`math.exp`, infinite where that would overflow."""
    return math.exp(nats) if nats < 700 else math.inf


# --- protocols ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Measured:
    """One model's likelihood of one split under one protocol, by document.

    Each array is float64 (documents,): `nll` in nats over `scored` tokens (where the protocol's own count differs from
    what it scores, both are in that count), `tokens` of the text, scored or not, `words` and `bytes` of the text.
    """

    nll: np.ndarray
    scored: np.ndarray
    tokens: np.ndarray
    words: np.ndarray
    bytes: np.ndarray

    def shares(self, normaliser: str) -> tuple[np.ndarray, np.ndarray]:
        """(nats, or bits for bits/byte, and units) by document; their sums' quotient is ln of the perplexity, or bits.

        Per word and byte, a token that the protocol leaves out counts as the mean of the others.
        """
        if normaliser == "tokens":
            return self.nll, self.scored
        whole = self.nll * (self.tokens.sum() / self.scored.sum())
        if normaliser == "words":
            return whole, self.words
        return (whole / math.log(2) if normaliser == "bits/byte" else whole), self.bytes

    def value(self, normaliser: str) -> float:
        """Perplexity per token, word or byte, or bits per byte; nan where there are no such units."""
        nats, units = (float(part.sum()) for part in self.shares(normaliser))
        if not units:
            return math.nan
        return nats / units if normaliser == "bits/byte" else exp(nats / units)


def difference(one: Measured, other: Measured, normaliser: str) -> tuple[float, float]:
    """How much larger ln(perplexity) (or bits/byte) is of `other`, and the standard error of that over the documents.

    The error is the ratio estimator's (Cochran, Sampling Techniques, 6.19): documents are taken as drawn at random,
    each with its difference and its length. nan where there are not two documents.
    """
    apart, parts = 0.0, np.zeros(len(one.nll))
    for sign, (nats, units) in ((-1, one.shares(normaliser)), (1, other.shares(normaliser))):
        total = float(units.sum())
        if not total:
            return math.nan, math.nan
        mean = float(nats.sum()) / total
        apart += sign * mean
        parts += sign * (nats - mean * units) / total
    count = int(np.count_nonzero(one.shares(normaliser)[1]))
    return apart, math.sqrt(count / (count - 1) * float((parts**2).sum())) if count > 1 else math.nan


def score_windows(
    losses: Callable[[Tensor, Tensor], Tensor],
    source: Iterable[Window],
    *,
    batch: int,
    world: World,
    progress: Callable[[], None],
) -> tuple[np.ndarray, np.ndarray]:
    """(nll, scored tokens) by document, float64 (documents,), the same on every rank.

    Every rank reads all of `source` and scores its share of the batches. `losses(inputs, targets)` takes int64 CPU
    tensors (M, L) and gives the loss of each position, 0 where the target is `IGNORED`.
    """
    import torch

    found = np.zeros((2, 0))
    windows_left: Iterator[Window] = iter(source)
    number = 0
    while group := list(islice(windows_left, batch)):
        highest = max(int(window.documents.max()) for window in group)
        if highest >= found.shape[1]:
            found = np.pad(found, ((0, 0), (0, max(highest + 1, 2 * found.shape[1]) - found.shape[1])))
        if number % world.size == world.rank:
            inputs, targets, weights, documents = _padded(group)
            loss = losses(torch.from_numpy(inputs), torch.from_numpy(targets)).double().cpu().numpy()
            there = targets.ravel() != IGNORED
            weights, documents = weights.ravel()[there], documents.ravel()[there]
            np.add.at(found, (0, documents), loss.ravel()[there] * weights)
            np.add.at(found, (1, documents), weights)
        number += 1
        progress()
    total = world.total(torch.from_numpy(found)).numpy()
    return total[0], total[1]


def _padded(group: list[Window]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, targets, weights and the targets' documents, each (M, longest of the group - 1)."""
    shape = len(group), max(len(window.ids) for window in group) - 1
    inputs, documents = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    targets, weights = np.full(shape, IGNORED, np.int64), np.zeros(shape)
    for row, window in enumerate(group):
        size = len(window.ids) - 1
        inputs[row, :size] = window.ids[:-1]
        targets[row, window.first - 1 : size] = window.ids[window.first :]
        documents[row, :size] = window.documents[1:]
        weights[row] = window.weight
    return inputs, targets, weights, documents
