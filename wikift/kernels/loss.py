"""The language model's head and its loss as one operation: the only home of the logits.

On a CPU in fp32 or bf16 the logits are made in chunks of the vocabulary, and the gradient with them, in the forward:

    E = exp(logits - reference)             reference: the target's own logit, so that loss = log(sum of E)
    dhidden = r * (E W) - W[target] / N     with r = 1 / (N * sum of E), N the number of positions
    dW = E' (r * hidden) - scatter of hidden / N

so no pass over the logits is left but the exponential's, and the softmax is never formed. Matmuls of few rows are slow
on a CPU, hence chunks of the vocabulary and not of the rows. A GPU takes chunks of the rows, whose logits become their
own gradient, so that memory does not grow with the micro-batch; the vocabulary is padded there, in memory only, to what
its matmuls want (nanoGPT pads the model: 50,257 to 50,304). So it is in fp16 everywhere, whose range E would leave.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wikift import kernels

NOT_SCORED = -100
_CHUNK = 2048  # vocabulary entries whose logits are held in fp32 at once
_TILE = 128  # rows of them that are worked on at once: 1 MB, which stays in a cache
_ROWS = 2048  # positions whose exponentials are kept at once: 206 MB in bf16 at GPT-2's vocabulary
_TOGETHER = 4096  # positions whose logits a GPU holds at once: 0.4 GB in bf16 at GPT-2's vocabulary, 0.8 GB in fp32
_PADDED_TO = 64  # vocabulary entries: rows of 128 bytes in bf16
_HIGHEST_SUM = 1e30  # above it the target is so unlikely (70 nats) that another reference is taken

# (logits, targets, factor) -> losses, and `factor` times the gradient of their sum by the logits
ToGradient = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
Graded = tuple[Tensor, Tensor | None, Tensor | None]  # losses by position, gradients by hidden and weight


def fuse_loss(head: nn.Linear, *, compile: bool = False) -> None:
    """Let `head` take targets: `head(hidden, targets)` is then `summed_loss`.

    The module stays the one that is called: ZeRO-3 fetches a weight when its module is.
    """
    to_gradient = compiled_passes() if compile else _to_gradient

    def forward(hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None:
            return F.linear(hidden, head.weight)
        return summed_loss(hidden, head.weight, targets, to_gradient)

    head.forward = forward  # type: ignore[method-assign, assignment]


@functools.cache
def compiled_passes() -> ToGradient:
    """The passes over whole logits, compiled."""
    return torch.compile(_to_gradient_fused, dynamic=False)


def summed_loss(hidden: Tensor, weight: Tensor, targets: Tensor, to_gradient: ToGradient | None = None) -> Tensor:
    """Summed negative log-likelihood (float64 scalar, nats) of `targets`, -100 not scored.

    `hidden` (positions, width), `weight` (vocabulary, width), `targets` (positions,) int64. The matmuls are in the
    autocast's precision, else in the wider of the two tensors'; everything is summed in fp32 or better.
    """
    if not torch.is_grad_enabled():
        return token_losses(hidden, weight, targets).double().sum()
    if kernels.plain:
        return plain_losses(hidden, weight, targets).double().sum()
    dtype = _dtype(hidden, weight)
    by_rows = hidden.device.type != "cpu" or dtype == torch.float16
    return graded_loss(hidden, weight, targets, dtype, (to_gradient or _to_gradient) if by_rows else None)


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What `summed_loss` sums, (positions,) in fp32, 0 where -100, without gradients."""
    dtype = _dtype(hidden, weight)
    if hidden.device.type == "cpu" and dtype != torch.float16 and not kernels.plain:
        losses, scored = torch.zeros(len(targets)), targets != NOT_SCORED  # windows that overlap score half of them
        with torch.autocast("cpu", enabled=False):
            losses[scored] = _chunked(hidden[scored], weight.to(dtype), targets[scored])[0]
        return losses
    parts = zip(hidden.split(_TOGETHER), targets.split(_TOGETHER), strict=True)
    return torch.cat([plain_losses(rows, weight, wanted) for rows, wanted in parts])


def plain_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """`token_losses`, with gradients, as torch computes them."""
    logits = F.linear(hidden, weight).float()  # (positions, vocabulary)
    return F.cross_entropy(logits, targets, ignore_index=NOT_SCORED, reduction="none")  # (positions,)


def graded_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, to_gradient: ToGradient | None
) -> Tensor:
    """`summed_loss` with matmuls in `dtype`, in chunks of the positions by `to_gradient`, else of the vocabulary.

    In fp16 the gradient of the sum, which has the range of probabilities: that of the mean would be lost below it.
    """
    factor = 1.0 if dtype == torch.float16 else 1 / len(targets)
    with torch.autocast(hidden.device.type, enabled=False):
        total: Tensor = _GradedLoss.apply(hidden, weight, targets, dtype, factor, to_gradient)  # type: ignore[no-untyped-call]
        return total


def _dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    if torch.is_autocast_enabled(hidden.device.type):
        return torch.get_autocast_dtype(hidden.device.type)
    return torch.promote_types(hidden.dtype, weight.dtype)


class _GradedLoss(torch.autograd.Function):
    """The summed loss. `factor` times its gradients are made in the forward: the mean's, which training asks for."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        dtype: torch.dtype,
        factor: float,
        to_gradient: ToGradient | None,
    ) -> Tensor:
        if to_gradient is None:
            losses, of_hidden, of_weight = _chunked(hidden, weight.to(dtype), targets, factor)
        else:
            losses, of_hidden, of_weight = _chunks_of_rows(hidden.to(dtype), weight, targets, factor, to_gradient)
        assert of_hidden is not None
        assert of_weight is not None
        ctx.gradients, ctx.factor = (of_hidden, of_weight.to(weight.dtype)), factor
        return losses.double().sum()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, of_weight = ctx.gradients  # (positions, width), (vocabulary, width)
        del ctx.gradients  # the engine adds to this memory
        scale = outer[0] / ctx.factor
        # a GPU does not wait for the number: multiplying costs it less
        if scale.device.type != "cpu" or abs(scale.item() - 1) > 1e-12:
            of_hidden, of_weight = of_hidden.mul_(scale), of_weight.mul_(scale)
        return of_hidden, of_weight, None, None, None, None


def _chunks_of_rows(hidden: Tensor, weight: Tensor, targets: Tensor, factor: float, to_gradient: ToGradient) -> Graded:
    entries, width = weight.shape
    low = hidden.new_zeros(-(-entries // _PADDED_TO) * _PADDED_TO, width)  # (padded vocabulary, width)
    low[:entries] = weight
    together = _chunk_of(len(hidden))
    # sums over the rows would be the first to leave fp16's range
    low_by = 1 / 16 if low.dtype == torch.float16 else 1.0
    of_weight: Tensor | None = None
    losses, of_hidden = [], []
    for rows, wanted in zip(hidden.split(together), targets.split(together), strict=True):
        logits = rows @ low.t()  # (rows, padded vocabulary)
        logits[:, entries:] = -torch.inf  # padding has a probability, and a gradient, of 0
        loss, gradient = to_gradient(logits, wanted, factor)  # (rows,), (rows, padded vocabulary)
        losses.append(loss)
        of_hidden.append(gradient @ low)  # (rows, width)
        product = (gradient.t() @ (rows if low_by == 1 else rows * low_by)).float()  # (padded vocabulary, width)
        of_weight = product if of_weight is None else of_weight.add_(product)
        del logits, gradient, product  # before the next ones are made
    assert of_weight is not None
    return torch.cat(losses), torch.cat(of_hidden), (of_weight if low_by == 1 else of_weight / low_by)[:entries]


def _chunk_of(positions: int) -> int:
    """Positions at once, at most _TOGETHER: all chunks of one shape where there is one, for they may be compiled."""
    chunks = -(-positions // _TOGETHER)
    even = next((number for number in range(chunks, 2 * chunks) if positions % number == 0), chunks)
    return -(-positions // even)


def _to_gradient(logits: Tensor, targets: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Losses (rows,) in fp32; `factor` times the gradient of their sum by `logits` (rows, vocabulary), written there.

    One tensor as large as they are in fp32 is made beside them, and few passes over it: they are what costs.
    """
    scored = targets != NOT_SCORED  # (rows,)
    wanted = targets.clamp(min=0)[:, None]  # (rows, 1)
    top, likeliest = logits.max(1, keepdim=True)  # (rows, 1)
    probabilities = logits.softmax(1, dtype=torch.float32)  # (rows, vocabulary)
    # the likeliest entry's probability, which is never 0, tells the sum of all exponentials
    own = logits.gather(1, wanted).float() - top.float() + probabilities.gather(1, likeliest).log()  # (rows, 1)
    losses = torch.where(scored, -own[:, 0], 0.0)
    probabilities.scatter_(1, wanted, own.expm1())  # no scatter_add: on a GPU its order is open
    torch.mul(probabilities, torch.where(scored, factor, 0.0)[:, None], out=logits)
    return losses, logits


def _to_gradient_fused(logits: Tensor, targets: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """The same to be compiled: on a GPU one kernel, which reads a row, reads it again from the cache, and writes it.

    To scatter, or to write to `logits`, would make several of it, and a tensor in fp32 between them.
    """
    scored = targets != NOT_SCORED  # (rows,)
    wanted = targets.clamp(min=0)[:, None]  # (rows, 1)
    likely = logits.log_softmax(1, dtype=torch.float32)  # (rows, vocabulary)
    losses = torch.where(scored, -likely.gather(1, wanted)[:, 0], 0.0)
    is_target = torch.arange(logits.shape[1], device=logits.device) == wanted  # (rows, vocabulary)
    gradient = (likely.exp() - is_target.float()) * torch.where(scored, factor, 0.0)[:, None]
    return losses, gradient.to(logits.dtype)


def _chunked(hidden: Tensor, weight: Tensor, targets: Tensor, factor: float = 0.0) -> Graded:
    """Losses by position, and `factor` times their sum's gradients by hidden and weight unless it is 0; in fp32."""
    of_weight = torch.zeros(weight.shape, dtype=torch.float32) if factor else None
    parts = zip(hidden.split(_ROWS), targets.split(_ROWS), strict=True)
    losses, of_hidden = zip(
        *(_rows_loss(rows, weight, wanted, factor, of_weight) for rows, wanted in parts), strict=True
    )
    return torch.cat(losses), torch.cat(of_hidden) if factor else None, of_weight


def _rows_loss(
    rows: Tensor, weight: Tensor, targets: Tensor, factor: float, of_weight: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Losses (rows,), their sum's gradient by `rows`; that by the weight is added to `of_weight`."""
    low = rows.to(weight.dtype)  # (rows, width)
    scored = targets != NOT_SCORED
    wanted = targets.clamp(min=0)
    own = weight[wanted]  # (rows, width)
    # rounded as the matmul rounds it, so that the target's exponential is 1
    logit = (low.float() * own.float()).sum(1).to(weight.dtype).float()  # (rows,)
    reference = logit
    sums, powers = _exponentials(low, weight, reference, keep=factor != 0)  # (rows,), [(rows, chunk)]
    if not bool((sums < _HIGHEST_SUM).all()):
        del powers
        reference = torch.stack([(low @ chunk.t()).amax(1) for chunk in weight.split(_CHUNK)]).amax(0).float()
        sums, powers = _exponentials(low, weight, reference, keep=factor != 0)
    loss = torch.where(scored, sums.log() + (reference - logit), 0.0)
    if of_weight is None:
        return loss, None
    gain = torch.where(scored, factor / sums, 0.0)[:, None]  # (rows, 1)
    scaled = (low.float() * gain).to(weight.dtype)  # (rows, width)
    of_rows = torch.zeros(rows.shape, dtype=torch.float32)
    for power, chunk, into in zip(powers, weight.split(_CHUNK), of_weight.split(_CHUNK), strict=True):
        _add_product(of_rows, power, chunk)  # (rows, chunk) @ (chunk, width)
        _add_product(into, power.t(), scaled)  # (chunk, rows) @ (rows, width)
    of_rows *= gain
    minus = torch.where(scored, -factor, 0.0)[:, None]  # (rows, 1)
    of_rows += own.float() * minus
    of_weight.index_add_(0, wanted, low.float() * minus)
    return loss, of_rows


def _add_product(into: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left` @ `right`, rounded to their type, to `into` in fp32."""
    if left.dtype == into.dtype:
        into.addmm_(left, right)  # no memory in between
    else:
        into.add_(left @ right)


def _exponentials(rows: Tensor, weight: Tensor, reference: Tensor, *, keep: bool) -> tuple[Tensor, list[Tensor]]:
    """exp(logits - reference): its sum over the vocabulary (rows,) in fp32, and, to `keep`, the chunks of it.

    A few rows at a time, in one fp32 buffer that stays in the processor's cache: passes over memory are what costs.
    """
    sums = torch.zeros(len(rows))
    powers = []
    buffer = torch.empty(_TILE, _CHUNK)
    tiles = list(zip(sums.split(_TILE), reference[:, None].split(_TILE), strict=True))
    for chunk in weight.split(_CHUNK):
        logits = rows @ chunk.t()  # (rows, chunk)
        for (total, subtracted), tile in zip(tiles, logits.split(_TILE), strict=True):
            wide = tile if tile.dtype == buffer.dtype else buffer[: len(tile), : len(chunk)]  # (tile, chunk)
            total += torch.sub(tile, subtracted, out=wide).exp_().sum(1)
            if keep and wide is not tile:
                tile.copy_(wide)
        if keep:
            powers.append(logits)
    return sums, powers
