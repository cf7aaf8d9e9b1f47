"""One switch takes the plain twin of every kernel. Run: pytest tests/kernels/test_plain.py"""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from wikift import kernels
from wikift.kernels.attention import attention
from wikift.kernels.dropout import draw_own_masks
from wikift.kernels.few_rows import helps
from wikift.kernels.loss import summed_loss, token_losses


@pytest.mark.parametrize(("value", "plain"), [("1", True), ("0", False), ("", False), (None, False)])
def test_it_is_set_in_the_environment(value: str | None, plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "plain", kernels.plain)  # puts it back
    monkeypatch.delenv("WIKIFT_PLAIN", raising=False)
    if value is not None:
        monkeypatch.setenv("WIKIFT_PLAIN", value)
    assert importlib.reload(kernels).plain is plain


def test_every_kernel_is_its_twin_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout from the same seed: torch's own masks are drawn."""
    monkeypatch.setattr(kernels, "plain", True)
    torch.manual_seed(0)
    rows, weight = torch.randn(4, 64), torch.randn(300, 64)
    targets = torch.tensor([3, -100, 299, 0])
    whole = F.cross_entropy(rows @ weight.t(), targets, reduction="none")
    torch.testing.assert_close(token_losses(rows, weight, targets), whole, rtol=0, atol=0)
    head = weight.clone().requires_grad_()
    assert summed_loss(rows, head, targets).item() == whole.double().sum().item()
    assert not helps(torch.device("cpu"), torch.float32), "the decoder takes the plain matmul"

    query, key, value = torch.randn(3, 2, 2, 16, 8)
    module = nn.Sequential(nn.Dropout(0.3))
    draw_own_masks(module)
    torch.manual_seed(1)
    ours = attention(SimpleNamespace(is_causal=True), query, key, value, None, dropout=0.3)[0], module(rows)
    torch.manual_seed(1)
    twin = F.scaled_dot_product_attention(query, key, value, dropout_p=0.3, is_causal=True).transpose(1, 2)
    assert torch.equal(ours[0], twin)
    assert torch.equal(ours[1], F.dropout(rows, 0.3))
