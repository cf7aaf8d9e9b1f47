"""Dropout in training on a CPU, where torch draws a mask one number after another.

A mask comes from 16 random bits an element, by an SFC64 stream that is seeded from torch's generator when the mask is
wanted: torch.manual_seed repeats it, on any number of threads, and so does gradient checkpointing. The rate is exact to
2**-16, and what is kept is scaled by that exact rate. On a GPU torch's own dropout stays.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wikift import kernels


class OwnDropout(nn.Dropout):
    """Dropout whose mask is `kept`'s on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        """`input`, dropped from while the module trains."""
        if kernels.plain or input.device.type != "cpu":
            return F.dropout(input, self.p, self.training)
        return drop(input, self.p) if self.training and self.p else input


def draw_own_masks(model: nn.Module) -> None:
    """Make each nn.Dropout of `model` an OwnDropout.

    The modules stay, and so do the hooks on them. They change their class and not their `forward`: torch.compile would
    compile each block again for a function of its own, and give up after eight.
    """
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.__class__ = OwnDropout


def drop(hidden: Tensor, rate: float) -> Tensor:
    """`hidden` / (1 - rate) where kept, 0 elsewhere; the same for the gradient."""
    return hidden * kept(hidden, rate) * gain(rate)


def kept(like: Tensor, rate: float) -> Tensor:
    """1 where kept, 0 where dropped, of the shape and type of `like`; each call draws again."""
    # in place and then converted: comparing into booleans, and multiplying by them, is not vectorised
    mask: Tensor = random_bits(like).ge_(_dropped(rate) - 2**15)
    return mask.to(like.dtype)


def gain(rate: float) -> float:
    """What is kept is multiplied by this, so that the mean stays."""
    return 2**16 / (2**16 - _dropped(rate))


def _dropped(rate: float) -> int:
    return round(rate * 2**16)


# torch.compile does not look inside. The tag asks it not to take two draws for one; in graphs with gradients torch 2.13
# does so all the same where both are over one tensor (fx_graph_cse has its own list), which no two in a GPT-2 are.
@torch.library.custom_op("wikift::random_bits", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def random_bits(like: Tensor) -> Tensor:
    """int16 of the shape of `like`, all 16 bits random."""
    stream = np.random.Generator(np.random.SFC64(int(torch.randint(2**62, ()))))
    numbers = stream.integers(0, 2**64, -(-like.numel() // 4), dtype=np.uint64)  # (a quarter of the elements,)
    return torch.from_numpy(numbers.view(np.int16))[: like.numel()].view(like.shape)


@random_bits.register_fake
def _(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=torch.int16, device=like.device)
