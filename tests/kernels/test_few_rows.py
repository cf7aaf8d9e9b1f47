"""A matmul in pieces is the matmul. Run: pytest tests/kernels/test_few_rows.py"""

from __future__ import annotations

import pytest
import torch

from wikift.kernels.few_rows import PIECES, matmul


@pytest.mark.parametrize("rows", [1, 3, 8, 9])
@pytest.mark.parametrize("width", [7, 48, 50])  # in one piece, 16 and 2
@pytest.mark.parametrize("contiguous", [True, False])
def test_a_matmul_in_pieces_is_the_matmul(rows: int, width: int, contiguous: bool) -> None:
    random = torch.Generator().manual_seed(rows)
    left, weight, bias = (torch.randn(shape, generator=random) for shape in ((rows, width), (width, 33), (33,)))
    weight = weight if contiguous else weight.t().contiguous().t()
    exact = left.double() @ weight.double()
    torch.testing.assert_close(matmul(PIECES, left, weight).double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(matmul(PIECES, left, weight, bias).double(), exact + bias, rtol=1e-5, atol=1e-5)
