"""The matmul of a few rows, which decoding makes for each token, split so that every thread has a part of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wikift import kernels

_PIECES = 16  # at most, of the input
_FEW_ROWS = 8  # with more rows arithmetic decides, not reading the weights


def helps(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether splitting is faster here: other libraries than MKL take a batch of matmuls one after the other."""
    on_mkl = device.type == "cpu" and dtype == torch.float32 and torch.backends.mkl.is_available()
    return not kernels.plain and on_mkl and torch.get_num_threads() > 1


def matmul(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`rows` (count, input) by `weight` (input, output), plus `bias`."""
    return rows @ weight if bias is None else torch.addmm(bias, rows, weight)


def split_matmul(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`matmul` to rounding; of few rows the sum of up to 16 matmuls, of a part of the input each.

    MKL keeps one thread at work on a matmul of few rows, and packs the weights first from two rows on. Of a batch of
    matmuls each thread takes its share: one row reads its weights at 20 to 25 GB/s for 17 (two cores with AVX2).
    """
    count, width = rows.shape
    pieces = math.gcd(width, _PIECES)
    if count > _FEW_ROWS or pieces == 1:
        return matmul(rows, weight, bias)
    parts = rows.view(count, pieces, -1).transpose(0, 1)
    product = torch.bmm(parts, weight.view(pieces, -1, weight.shape[1])).sum(0)
    return product if bias is None else product.add_(bias)
