"""GPT-2's weights as the decoder reads them, a token at a time, and the products that read them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PIECES = 16  # at most, of the input of a product of few rows
_FEW_ROWS = 8  # that a product reads its weights for; with more its arithmetic decides
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")


class Layer(NamedTuple):
    """One layer's weights; matrices are (input, output)."""

    ln_1: Any
    qkv: Tensor
    qkv_bias: Tensor
    proj: Tensor
    proj_bias: Tensor
    ln_2: Any
    fc: Tensor
    fc_bias: Tensor
    act: Callable[[Tensor], Tensor]
    out: Tensor
    out_bias: Tensor
    scale: float


def product_of(pieces: int, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`rows` (count, input) by `weight` (input, output), and `bias`; few rows as products of `pieces` of the input.

    MKL's product of few rows keeps one thread at work, and packs the weights first from two rows on. Of a batch of such
    products each thread takes its share: one row reads its weights at 20 to 25 GB/s for 17 (two cores with AVX2).
    """
    count, width = rows.shape
    pieces = math.gcd(width, pieces)
    if count > _FEW_ROWS or pieces == 1:
        return rows @ weight if bias is None else torch.addmm(bias, rows, weight)
    parts = rows.view(count, pieces, -1).transpose(0, 1)
    product = torch.bmm(parts, weight.view(pieces, -1, weight.shape[1])).sum(0)
    return product if bias is None else product.add_(bias)


def layer_of(model: Any, number: int) -> Layer:
    block, config = model.transformer.h[number], model.config
    scale = (config.n_embd // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0
    if config.scale_attn_by_inverse_layer_idx:
        scale /= number + 1
    tanh = config.activation_function in _TANH_GELU
    attention, mlp = block.attn, block.mlp
    return Layer(
        block.ln_1,
        attention.c_attn.weight.detach(),
        attention.c_attn.bias.detach(),
        attention.c_proj.weight.detach(),
        attention.c_proj.bias.detach(),
        block.ln_2,
        mlp.c_fc.weight.detach(),
        mlp.c_fc.bias.detach(),
        (lambda x: F.gelu(x, approximate="tanh")) if tanh else mlp.act,
        mlp.c_proj.weight.detach(),
        mlp.c_proj.bias.detach(),
        scale,
    )


def relayout_head(model: Any) -> None:
    """Lay the head in memory as a product of few rows reads it, without a second copy; the model computes as before."""
    model.lm_head.weight.data = model.lm_head.weight.detach().t().contiguous().t()
    if model.config.tie_word_embeddings:
        model.transformer.wte.weight = model.lm_head.weight
