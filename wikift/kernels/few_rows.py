"""GPT-2's weights as the decoder reads them, a token at a time, and the matmul that reads them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wikift import kernels

PIECES = 16  # at most, of the input of a matmul of few rows
_FEW_ROWS = 8  # that a matmul reads its weights for; with more its arithmetic decides
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")


def matmul(pieces: int, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`rows` (count, input) @ `weight` (input, output) + `bias` (output,), of few rows in `pieces` of the input.

    MKL's matmul of few rows keeps one thread at work, and packs the weights first from two rows on. Of a batch of
    smaller ones each thread takes some: one row reads its weights at 20 to 25 GB/s for 17 (two cores with AVX2).
    """
    count, width = rows.shape
    pieces = math.gcd(width, pieces)
    if kernels.plain or count > _FEW_ROWS or pieces == 1:
        return rows @ weight if bias is None else torch.addmm(bias, rows, weight)  # (count, output)
    parts = rows.view(count, pieces, -1).transpose(0, 1)  # (pieces, count, input / pieces)
    product = torch.bmm(parts, weight.view(pieces, -1, weight.shape[1])).sum(0)  # (count, output)
    return product if bias is None else product.add_(bias)


class Layer(NamedTuple):
    """One layer's weights; matrices are (input, output)."""

    ln_1: Any
    ln_2: Any
    act: Callable[[Tensor], Tensor]
    scale: float
    qkv: Tensor  # (width, 3 * width)
    qkv_bias: Tensor
    proj: Tensor  # (width, width)
    proj_bias: Tensor
    fc: Tensor  # (width, inner)
    fc_bias: Tensor
    out: Tensor  # (inner, width)
    out_bias: Tensor


def layer_of(model: Any, number: int) -> Layer:
    """The weights of `model`'s layer, without gradients."""
    block, config = model.transformer.h[number], model.config
    scale = (config.n_embd // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0
    if config.scale_attn_by_inverse_layer_idx:
        scale /= number + 1
    tanh = config.activation_function in _TANH_GELU
    act = (lambda x: F.gelu(x, approximate="tanh")) if tanh else block.mlp.act
    modules = (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
    weights = [parameter.detach() for module in modules for parameter in (module.weight, module.bias)]
    return Layer(block.ln_1, block.ln_2, act, scale, *weights)


def relayout_head(model: Any) -> None:
    """Lay the head in memory as a matmul of few rows reads it, without a second copy; the model computes as before."""
    model.lm_head.weight.data = model.lm_head.weight.detach().t().contiguous().t()
    if model.config.tie_word_embeddings:
        model.transformer.wte.weight = model.lm_head.weight
