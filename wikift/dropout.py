"""Dropout and attention in training on a CPU, where torch draws a mask one number after another.

A mask comes from 16 random bits an element, by an SFC64 stream that is seeded from torch's generator when the mask is
wanted: torch.manual_seed repeats it, on any number of threads, and so does gradient checkpointing. The rate is exact to
2**-16, and what is kept is scaled by that exact rate. On a GPU torch's own dropout stays.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

ATTENTION = "wikift"  # as a configuration's _attn_implementation


def draw_own_masks(model: nn.Module) -> None:
    """Let each nn.Dropout of `model` be `drop` on a CPU. The modules stay, and so do the hooks on them."""
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.forward = functools.partial(_forward, module)  # type: ignore[method-assign]


def _forward(module: nn.Dropout, hidden: Tensor) -> Tensor:
    if hidden.device.type != "cpu":
        return F.dropout(hidden, module.p, module.training)
    return drop(hidden, module.p) if module.training and module.p else hidden


def drop(hidden: Tensor, rate: float) -> Tensor:
    """`hidden` / (1 - rate) where kept, 0 elsewhere; the same for the gradient."""
    dropped = round(rate * 2**16)
    kept: Tensor = random_bits(hidden) >= dropped - 2**15
    return hidden * kept * (2**16 / (2**16 - dropped))


# torch.compile does not look inside, and must not take two draws for one: hence the tag
@torch.library.custom_op("wikift::random_bits", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def random_bits(like: Tensor) -> Tensor:
    """int16 of the shape of `like`, all 16 bits random."""
    seed = int(torch.randint(2**62, ()))
    stream = np.random.Generator(np.random.SFC64(seed))
    numbers = stream.integers(0, 2**64, -(-like.numel() // 4), dtype=np.uint64)
    return torch.from_numpy(numbers.view(np.int16))[: like.numel()].view(like.shape)


@random_bits.register_fake
def _(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=torch.int16, device=like.device)


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
    """Causal attention, (rows, heads, length, width) each; scores are summed up and normalised in fp32."""
    if not dropout or attention_mask is not None or query.device.type != "cpu":
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
        )
    length = query.shape[2]
    scores = (query @ key.transpose(2, 3)).float() * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    ahead = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    shares = scores.masked_fill(ahead, -torch.inf).softmax(-1)
    out = drop(shares, dropout).to(value.dtype) @ value
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
