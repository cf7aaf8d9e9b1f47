"""Attention in training on a CPU: torch's but for the masks, and its own gradient."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from wikift.kernels.attention import attention

LENGTHS = [1, 17, 64, 65, 200]  # in pieces of 64
CAUSAL = SimpleNamespace(is_causal=True)


def made(length: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Query, key, value (2 rows, 3 heads, length, 8) as GPT-2 has them: views into one tensor."""
    torch.manual_seed(7)
    joint = torch.randn(2, length, 72).to(torch.bfloat16).to(dtype).requires_grad_()
    return joint, *split(joint)


def split(joint: Tensor) -> Iterator[Tensor]:
    return (part.view(2, -1, 3, 8).transpose(1, 2) for part in joint.split(24, dim=2))


def with_gradient(joint: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    torch.manual_seed(8)
    outer = torch.randn(out.shape).to(out.dtype)
    return out.detach(), torch.autograd.grad(out, joint, outer)[0]


def dropping(query: Tensor, key: Tensor, value: Tensor, rate: float, **more: float) -> Tensor:
    torch.manual_seed(9)
    return attention(CAUSAL, query, key, value, None, dropout=rate, **more)[0]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("scaling", [None, 0.2])
def test_it_is_torchs_where_little_is_dropped(length: int, scaling: float | None) -> None:
    """At a rate of one in a million, which is 0 in 16 bits, all is kept: what differs is the order of the sums."""
    joint, query, key, value = made(length)
    found = with_gradient(joint, dropping(query, key, value, 1e-6, scaling=scaling))
    right = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling).transpose(1, 2)
    for mine, torchs in zip(found, with_gradient(joint, right), strict=True):
        torch.testing.assert_close(mine, torchs, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("length", LENGTHS)
def test_its_gradient_is_that_of_the_masked_softmax(length: int) -> None:
    """The mask that a seed draws is read off by values that tell the keys apart, then given to plain operations."""
    joint, query, key, value = made(length)
    scaling, width = 8**-0.5, max(8, length)
    every = torch.eye(length, width).expand(2, 3, length, width)
    wide = (pad(part, (0, width - 8)) for part in (query, key))
    probabilities = dropping(*wide, every, 0.4, scaling=scaling).detach().transpose(1, 2)
    probabilities = probabilities[..., :length]
    kept = probabilities != 0
    below = torch.ones(length, length).tril().bool()
    assert not kept[~below.expand_as(kept)].any()
    drawn = kept[below.expand_as(kept)].double()
    assert abs(drawn.mean() - 0.6) < 5 * (0.24 / len(drawn)) ** 0.5

    found = with_gradient(joint, dropping(query, key, value, 0.4))
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~below, -torch.inf)
    exact = 2**16 / (2**16 - round(0.4 * 2**16))
    right = (scores.softmax(-1) * kept * exact) @ value
    for mine, plain in zip(found, with_gradient(joint, right.transpose(1, 2)), strict=True):
        torch.testing.assert_close(mine, plain, atol=2e-6, rtol=1e-5)


def test_in_bf16_it_is_as_near_to_fp32_as_plain_operations() -> None:
    joint, query, key, value = made(200)
    exact = with_gradient(joint, dropping(query, key, value, 1e-6))
    low, *parts = made(200, torch.bfloat16)
    mine = with_gradient(low, dropping(*parts, 1e-6))
    query, key, value = parts
    below = torch.ones(200, 200).tril().bool()
    scores = (query @ key.transpose(2, 3) * 8**-0.5).masked_fill(~below, -torch.inf)
    probabilities = scores.softmax(-1, dtype=torch.float32).to(torch.bfloat16)  # as Hugging Face's eager attention
    plain = with_gradient(low, (probabilities @ value).transpose(1, 2))
    for of_mine, of_plain, right in zip(mine, plain, exact, strict=True):
        assert of_mine.dtype == torch.bfloat16
        assert (of_mine - right).norm() < 1.1 * (of_plain - right).norm()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
def test_compiled_it_is_the_same() -> None:
    """Two in a row, as a model's: each over tensors of its own."""

    def twice(joint: Tensor) -> Tensor:
        query, key, value = split(joint)
        found = attention(CAUSAL, query, key, value, None, dropout=0.5)[0].transpose(1, 2)
        return attention(CAUSAL, found, key, value, None, dropout=0.5)[0]

    joint, *_ = made(70)
    torch.manual_seed(9)
    eager = with_gradient(joint, twice(joint))
    torch.manual_seed(9)
    compiled = with_gradient(joint, torch.compile(twice, dynamic=False)(joint))
    for one, other in zip(eager, compiled, strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-5)


def test_what_autograd_wants_of_an_operation() -> None:
    _, *parts = made(70)
    flat = [part.flatten(0, 1).detach().requires_grad_() for part in parts]
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.wikift.attend, (*flat, 0.3, 1e-6), test_utils=checks)
