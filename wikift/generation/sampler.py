"""The next token from logits, and whether rounding could have made it another one.

A matmul of 32 rows is not rounded as 32 matmuls of one row are, so logits of the same text differ in their last bits
between a batch and one prompt alone. Where the choice depends on these bits `choose` calls it doubtful, and the caller
asks again with logits of that text read by itself. Each text has a random stream of its own (`uniforms`), one number a
token, the same on every device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wikift.base.world import seed

_GREEDY_BELOW = 1e-4  # logits divided by less leave fp32's range
# How far rounding may move a logit against the others, relative to the largest: four times the most that was seen
# between a batch of 12 rows and one alone (2.5e-6, 12 layers).
ROUNDING = 1e-5


@dataclass(frozen=True)
class Sampling:
    """How a text is made; the meaning and the order are those of transformers' logits processors.

    Temperature 0 takes the likeliest token, `top_k` 0 and `top_p` 1 keep all tokens.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 128
    seed: int = 42
    stop: tuple[str, ...] = ()
    num_return_sequences: int = 1


def uniforms(seed_: int, number: int, sequence: int = 0) -> Iterator[float]:
    """The random numbers in [0, 1) of answer `number` under a seed, or of a further `sequence` of it; never ends."""
    parts = (number, sequence) if sequence else (number,)
    generator = np.random.Generator(np.random.Philox(seed(seed_, *parts)))
    while True:
        yield float(generator.random())


def penalise(logits: Tensor, windows: list[list[int]], penalty: float) -> Tensor:
    """Logits (rows, vocabulary) with those of the tokens in each row's window made smaller by CTRL's rule."""
    if penalty == 1:
        return logits
    seen = torch.zeros_like(logits, dtype=torch.bool)
    for row, window in enumerate(windows):
        seen[row, window] = True
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def choose(
    logits: Tensor, sampling: Sampling, drawn: Tensor, rounding: float = ROUNDING
) -> tuple[list[int], list[int]]:
    """A token for each row of `logits` (rows, vocabulary) in fp32, and the rows whose choice is doubtful.

    `drawn` (rows,), float64 in [0, 1), decides between the tokens. With `rounding` 0 nothing is doubtful.
    """
    slack = logits.abs().amax(-1).double() * rounding  # (rows,)
    if sampling.temperature < _GREEDY_BELOW:
        values, ids = logits.topk(min(2, logits.shape[-1]), dim=-1)
        tokens, doubtful = ids[:, 0], values[:, 0] - values[:, -1] < slack
    else:
        scaled = logits.double() / sampling.temperature
        tokens, doubtful = _draw(scaled, sampling, drawn.to(logits.device), slack / sampling.temperature)
    return tokens.tolist(), doubtful.nonzero().flatten().tolist() if rounding else []


def _draw(scaled: Tensor, sampling: Sampling, drawn: Tensor, slack: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and which are doubtful, (rows,) each: `drawn` is a position on a line of the kept tokens' probabilities.

    Rounding moves a border between two tokens by no more than `slack`, relative to the line.
    """
    size = scaled.shape[-1]
    count = min(sampling.top_k or size, size)
    ordered = count < size or sampling.top_p < 1  # if all tokens are kept, no order is needed
    values, ids = scaled, torch.empty(0)
    if ordered:
        values, ids = scaled.topk(min(count + 1, size), dim=-1)  # the first one removed tells how clear the cut is
    likely = values[:, :count].softmax(-1)
    cumulative = likely.cumsum(-1)
    before = cumulative - likely
    kept = (before < sampling.top_p).sum(-1) if ordered else torch.full_like(drawn, size).long()  # (rows,), 1 or more
    target = drawn * _at(cumulative, kept - 1)
    index = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0].clamp(max=kept - 1)
    doubtful = (cumulative - target[:, None]).abs().amin(-1) < slack
    if not ordered:
        return index, doubtful
    if sampling.top_p < 1:  # one token more or less
        doubtful |= ((before - sampling.top_p).abs() < slack[:, None]).any(-1)
    close = (values[:, :-1] - values[:, 1:] < slack[:, None]).double()  # between each token and the next
    close = torch.nn.functional.pad(close, (1, 1))
    return _at(ids, index), doubtful | (_at(close, index) + _at(close, index + 1) > 0)


def _at(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(-1, index[:, None])[:, 0]
