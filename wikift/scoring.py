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
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from wikift.errors import UserError
from wikift.tokens import TokenStore

if TYPE_CHECKING:
    from torch import Tensor

    from wikift.world import World

IGNORED = -100  # target of a position that is not scored: torch's and transformers' ignore_index


@dataclasses.dataclass(frozen=True)
class Score:
    """One model's likelihood of one split. `nll` is in nats, summed over `tokens` scored tokens.

    `words` counts one end of line per row, as the papers on WikiText do; `bytes` are UTF-8. Both are of the whole
    split, so that the numbers of two tokenizers can be compared.
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
        return _exp(self.nll / self.tokens)

    @property
    def word_perplexity(self) -> float:
        """Per word: the sum is spread over the words, not over the tokens (openai/gpt-2#78)."""
        return _exp(self.nll / self.words) if self.words else math.nan

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of UTF-8 text."""
        return self.nll / math.log(2) / self.bytes if self.bytes else math.nan


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


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
