"""The split matmul of a few rows beside the plain one. Run: pytest tests/kernels/test_few_rows.py"""

from __future__ import annotations

import pytest
import torch

from wikift.kernels.few_rows import helps, matmul, split_matmul


@pytest.mark.parametrize("rows", [1, 3, 8, 9])
@pytest.mark.parametrize("width", [7, 48, 50])  # in one piece, 16 and 2
@pytest.mark.parametrize("contiguous", [True, False])
def test_both_are_the_product(rows: int, width: int, contiguous: bool) -> None:
    random = torch.Generator().manual_seed(rows)
    left, weight, bias = (torch.randn(shape, generator=random) for shape in ((rows, width), (width, 33), (33,)))
    weight = weight if contiguous else weight.t().contiguous().t()
    exact = left.double() @ weight.double()
    for product in (matmul, split_matmul):
        torch.testing.assert_close(product(left, weight).double(), exact, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(product(left, weight, bias).double(), exact + bias, rtol=1e-5, atol=1e-5)


def test_it_is_split_for_several_threads_of_mkl_in_fp32_only(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert helps(cpu, torch.float32)
    assert not helps(cpu, torch.bfloat16)
    assert not helps(torch.device("meta"), torch.float32)
    for name, answer in (("get_num_threads", 1), ("backends.mkl.is_available", False)):
        with monkeypatch.context() as patch:
            patch.setattr(f"torch.{name}", lambda answer=answer: answer)
            assert not helps(cpu, torch.float32)
