"""Causal attention with dropout in training on a CPU, as one operation.

Queries go in pieces, each against the keys up to its own end: the half of the square that the mask hides is neither
multiplied nor drawn. What is kept for the backward is one fp32 number a pair, its probability, negative where it was
kept. Elsewhere it is torch's scaled_dot_product_attention, which has no fast way with dropout on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from wikift import kernels
from wikift.kernels.dropout import gain, kept

NAME = "wikift"  # as a configuration's _attn_implementation
_TOGETHER = 64  # queries of a piece: fewer waste less of the square, and their matmuls get slow


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Causal attention, (rows, heads, length, width) each; returns (rows, length, heads, width).

    Scores are summed up and normalised in fp32.
    """
    if kernels.plain or not dropout or attention_mask is not None or query.device.type != "cpu":
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
        )
    flat = (part.flatten(0, 1) for part in (query, key, value))  # (rows * heads, length, width)
    out, _ = attend(*flat, query.shape[-1] ** -0.5 if scaling is None else scaling, dropout)
    return out.view(query.shape).transpose(1, 2).contiguous(), None


# No mask is registered: transformers would look for packed texts in each forward, and a GPU be waited for.
AttentionInterface.register(NAME, attention)


def causal_mask(seen: Tensor) -> Tensor:
    """(rows, 1, length, length), true where a query attends to a key: itself, and earlier ones that are `seen`.

    `seen` (rows, length) is 0 at padding, which attends to itself, or its row would be NaN and spread.
    """
    length = seen.shape[1]
    square = torch.ones(length, length, dtype=torch.bool, device=seen.device)
    return (seen.bool()[:, None, None] & square.tril()) | torch.eye(length, dtype=torch.bool, device=seen.device)


# The tag: as dropout.random_bits has it.
@torch.library.custom_op("wikift::attend", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float) -> tuple[Tensor, Tensor]:
    """What each of `query` takes of `value`, (heads, length, width) each; and the signed probabilities, flat."""
    heads, length, _ = query.shape
    kept_probabilities = torch.empty(_pairs(heads, length))
    out = torch.empty_like(query)  # (heads, length, width)
    ahead = torch.ones(_TOGETHER, _TOGETHER, dtype=torch.bool).triu(1)
    for first, end, signed in _pieces(kept_probabilities, heads, length):
        scores = (query[:, first:end] @ key[:, :end].transpose(1, 2)).float().mul_(scaling)  # (heads, queries, keys)
        scores[:, :, first:].masked_fill_(ahead[: end - first, : end - first], -torch.inf)
        probabilities = scores.softmax(-1)  # (heads, queries, keys)
        used = probabilities * kept(probabilities, dropout)  # (heads, queries, keys)
        torch.sub(probabilities, used, alpha=2, out=signed)
        out[:, first:end] = (used.to(value.dtype) @ value[:, :end]).mul_(gain(dropout))
    return out, kept_probabilities


@attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(_pairs(*query.shape[:2]), dtype=torch.float32)


@torch.library.custom_op("wikift::attend_backward", mutates_args=())
def attend_backward(
    outer: Tensor, query: Tensor, key: Tensor, value: Tensor, probabilities: Tensor, scaling: float, dropout: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by query, key and value from that by what `attend` returned, `outer` (heads, length, width)."""
    heads, length, _ = query.shape
    outer = outer * -gain(dropout)
    of_query = torch.empty_like(query)  # (heads, length, width)
    of_key, of_value = (torch.zeros(key.shape) for _ in range(2))
    for first, end, signed in _pieces(probabilities, heads, length):
        queries, outers = query[:, first:end], outer[:, first:end]  # (heads, queries, width)
        used = signed.clamp(max=0)  # (heads, queries, keys), times -1, as `outer` is
        of_value[:, :end] += used.to(value.dtype).transpose(1, 2) @ outers
        grown = (outers @ value[:, :end].transpose(1, 2)).float().mul_(used)  # (heads, queries, keys)
        # the softmax's: probability * (its gradient - the row's mean gradient)
        grown.addcmul_(signed.abs(), grown.sum(-1, keepdim=True), value=-1)
        of_scores = grown.mul_(scaling).to(query.dtype)  # (heads, queries, keys)
        of_query[:, first:end] = of_scores @ key[:, :end]
        of_key[:, :end] += of_scores.transpose(1, 2) @ queries
    return of_query, of_key.to(key.dtype), of_value.to(value.dtype)


@attend_backward.register_fake
def _(
    outer: Tensor, query: Tensor, key: Tensor, value: Tensor, probabilities: Tensor, scaling: float, dropout: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float, float], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scaling, ctx.dropout = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, outer: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
    return *attend_backward(outer, *ctx.saved_tensors, ctx.scaling, ctx.dropout), None, None


attend.register_autograd(_backward, setup_context=_keep)


def _pieces(probabilities: Tensor, heads: int, length: int) -> Iterator[tuple[int, int, Tensor]]:
    """First query, the end of the queries and of their keys, and the probabilities (heads, queries, keys) of these."""
    start = 0
    for first in range(0, length, _TOGETHER):
        end = min(first + _TOGETHER, length)
        stop = start + heads * (end - first) * end
        yield first, end, probabilities[start:stop].view(heads, end - first, end)
        start = stop


def _pairs(heads: int, length: int) -> int:
    full, rest = divmod(length, _TOGETHER)
    return heads * (_TOGETHER**2 * full * (full + 1) // 2 + rest * length)
