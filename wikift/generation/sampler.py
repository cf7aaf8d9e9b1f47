"""The next token from logits, and whether rounding could have made it another one.

A product of 32 rows is not rounded as 32 products of one row are, so logits of the same text differ in their last bits
between a batch and one prompt alone. Where the choice hangs on these bits `choose` calls it doubtful, and the caller
asks again with logits of that text read by itself: then a text does not depend on its neighbours. Each text has a
random stream of its own (`uniforms`), one number a token, the same on every device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wikift.base.world import seed

_GREEDY_BELOW = 1e-4  # logits divided by less leave fp32's range
# How far rounding may move a logit against the others, in parts of the largest: four times the most that was seen
# between a batch of 12 rows and one alone (2.5e-6, 12 layers).
ROUNDING = 1e-5


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn; the meaning and the order are those of transformers' logits processors.

    Temperature 0 takes the likeliest token, `top_k` 0 and `top_p` 1 leave all tokens in.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    @property
    def greedy(self) -> bool:
        return self.temperature < _GREEDY_BELOW


def uniforms(seed_: int, number: int, sequence: int = 0) -> Iterator[float]:
    """The random numbers in [0, 1) of answer `number` under a seed, or of a further `sequence` of it; never ends."""
    parts = (number, sequence) if sequence else (number,)
    generator = np.random.Generator(np.random.Philox(seed(seed_, *parts)))
    while True:
        yield float(generator.random())


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits (rows, vocabulary) with those of tokens `seen` (rows, vocabulary) made smaller by CTRL's rule."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def choose(
    logits: Tensor, sampling: Sampling, drawn: Tensor, rounding: float = ROUNDING
) -> tuple[list[int], list[int]]:
    """A token for each row of `logits` (rows, vocabulary) in fp32, and the rows whose choice is doubtful.

    `drawn` (rows,), float64 in [0, 1), decides between the tokens. `rounding` 0 doubts nothing.
    """
    low, high = logits.aminmax(dim=-1)
    slack = torch.maximum(low.abs(), high.abs()).double() * rounding  # (rows,)
    if sampling.greedy:
        values, ids = logits.topk(min(2, logits.shape[-1]), dim=-1)
        doubtful = values[:, 0] - values[:, -1] < slack
        tokens = ids[:, 0]
    else:
        scaled = logits.double() / sampling.temperature
        tokens, doubtful = _draw(scaled, sampling, drawn.to(logits.device), slack / sampling.temperature)
    rows = doubtful.nonzero().flatten().tolist() if rounding else []
    return tokens.tolist(), rows


def _draw(scaled: Tensor, sampling: Sampling, drawn: Tensor, slack: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (rows,) and doubts (rows,): the tokens kept stand in a row, each as long as it is likely, `drawn` points.

    A border between two tokens moves by no more than `slack`, in parts of the whole.
    """
    size = scaled.shape[-1]
    count = min(sampling.top_k or size, size)
    if count == size and sampling.top_p >= 1:  # nothing is left out: no order is needed
        cumulative = scaled.softmax(-1).cumsum(-1)
        index = _pointed(cumulative, drawn * cumulative[:, -1], size)
        return index, _near_a_border(cumulative, drawn * cumulative[:, -1], index, slack)
    values, ids = scaled.topk(min(count + 1, size), dim=-1)  # the first one left out tells how clear the cut is
    likely = values[:, :count].softmax(-1)
    cumulative = likely.cumsum(-1)
    before = cumulative - likely
    kept = (before < sampling.top_p).sum(-1)  # (rows,), 1 or more
    target = drawn * _at(cumulative, kept - 1)
    index = torch.minimum(_pointed(cumulative, target, count), kept - 1)
    doubtful = _near_a_border(cumulative, target, index, slack)
    if sampling.top_p < 1:  # one token more or less
        cut = kept.clamp(max=count - 1)
        edges = torch.stack([_at(before, cut), _at(before, kept - 1)])
        doubtful |= ((edges - sampling.top_p).abs() < slack).any(0)
    value = _at(values, index)
    above, below = _at(values, (index - 1).clamp(min=0)), _at(values, (index + 1).clamp(max=values.shape[-1] - 1))
    doubtful |= ((above - value < slack) & (index > 0)) | ((value - below < slack) & (index + 1 < values.shape[-1]))
    return _at(ids, index), doubtful


def _pointed(cumulative: Tensor, target: Tensor, size: int) -> Tensor:
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0].clamp(max=size - 1)


def _near_a_border(cumulative: Tensor, target: Tensor, index: Tensor, slack: Tensor) -> Tensor:
    end = (_at(cumulative, index) - target).abs() < slack
    return end | (((_at(cumulative, (index - 1).clamp(min=0)) - target).abs() < slack) & (index > 0))


def _at(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(-1, index[:, None])[:, 0]
