"""Dropout and attention in training on a CPU, where torch draws each mask one number after another.

The masks of a forward come from 32 random bits an element, drawn at once, outside of what torch.compile sees: by SFC64
streams seeded from torch's generator, one a module, so that torch.manual_seed repeats them on any number of threads.
The rate is exact to 2**-32, and a kept value is scaled in fp32. On a GPU torch's own dropout stays.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

ATTENTION = "wikift"
_pool = ThreadPoolExecutor()


class Dropout(nn.Module):
    """nn.Dropout whose random bits are put in `bits` before each forward in training."""

    bits: Tensor | None = None  # int32, of the input's shape

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, hidden: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return hidden
        assert self.bits is not None
        return drop(hidden, self.bits, self.p)


def drop(hidden: Tensor, bits: Tensor, p: float) -> Tensor:
    """`hidden` / (1 - p) where kept, 0 elsewhere; the same for the gradient."""
    kept = bits >= round(p * 2**32) - 2**31
    return hidden * kept * (1 / (1 - p))


def replace_dropout(model: GPT2LMHeadModel) -> list[tuple[Dropout, bool]]:
    """Put a Dropout in the place of each nn.Dropout; gives them, and whether each is an attention's."""
    found = []
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.Dropout):
                made = Dropout(child.p)
                made.train(child.training)
                setattr(parent, name, made)
                found.append((made, name == "attn_dropout"))
    model.config._attn_implementation = ATTENTION
    return found


def draw(dropouts: list[tuple[Dropout, bool]], rows: int, length: int, config: Any) -> None:
    """Random bits for one forward of `rows` times `length` tokens."""
    wanted = [(module, in_attention) for module, in_attention in dropouts if module.p]
    if not wanted:
        return
    seeds = torch.randint(2**62, (len(wanted),)).tolist()
    shapes = {True: (rows, config.n_head, length, length), False: (rows, length, config.n_embd)}

    def fill(place: int) -> None:
        module, in_attention = wanted[place]
        shape = shapes[in_attention]
        count = int(np.prod(shape))
        stream = np.random.Generator(np.random.SFC64(seeds[place]))
        numbers = stream.integers(0, 2**64, -(-count // 2), dtype=np.uint64)
        module.bits = torch.from_numpy(numbers.view(np.int32))[:count].view(shape)

    list(_pool.map(fill, range(len(wanted))))


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
    if dropout == 0 or not isinstance(module.attn_dropout, Dropout):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
        )
    assert attention_mask is None, "blocks are not padded"
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    length = query.shape[2]
    scores = (query @ key.transpose(2, 3)).float() * scaling
    ahead = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    shares = scores.masked_fill(ahead, -torch.inf).softmax(-1)
    bits = module.attn_dropout.bits
    assert bits is not None
    out = drop(shares, bits, dropout).to(value.dtype) @ value
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
