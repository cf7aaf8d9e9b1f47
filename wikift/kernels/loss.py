"""The language model's head and its loss as one operation: the only home of the logits.

On a CPU in fp32 or bf16 the logits are made in chunks of the vocabulary, and the gradient with them, in the forward:

    E = exp(logits - reference)             reference: the target's own logit, so that loss = log(sum of E)
    dhidden = r * (E W) - W[target] / N     with r = 1 / (N * sum of E), N the number of positions
    dW = E' (r * hidden) - scatter of hidden / N

so no pass over the logits is left but the exponential's, and the softmax is never formed. Products of few rows are slow
on a CPU, hence chunks of the vocabulary and not of the rows. A GPU takes chunks of the rows, whose logits become their
own gradient, so that memory does not grow with the micro-batch; the vocabulary is padded there, in memory only, to what
its products want (nanoGPT pads the model: 50,257 to 50,304). So it is in fp16 everywhere, whose range E would leave.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NOT_SCORED = -100
_CHUNK = 2048  # words of the vocabulary whose logits are held in fp32 at once
_TILE = 128  # rows of them that are worked on at once: 1 MB, which stays in a cache
_ROWS = 2048  # positions whose exponentials are kept at once: 206 MB in bf16 at GPT-2's vocabulary
_TOGETHER = 4096  # positions whose logits a GPU holds at once: 0.4 GB in bf16 at GPT-2's vocabulary, 0.8 GB in fp32
_PADDED_TO = 64  # words: rows of 128 bytes in bf16
_HIGHEST_SUM = 1e30  # above it the target is so unlikely (70 nats) that another reference is taken


def fuse_loss(head: nn.Linear, *, compile: bool = False) -> None:
    """Let `head` take targets: `head(hidden, targets)` is then `summed_loss`.

    The module stays the one that is called: ZeRO-3 fetches a weight when its module is.
    """
    passes = compiled_passes() if compile else _to_gradient
    head.forward = functools.partial(_forward, head, passes)  # type: ignore[method-assign]


# (logits, targets, share) -> losses, and `share` times the gradient of their sum by the logits
ToGradient = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]


@functools.cache
def compiled_passes() -> ToGradient:
    """The passes over whole logits, compiled."""
    return torch.compile(_to_gradient_fused, dynamic=False)


def _forward(head: nn.Linear, to_gradient: ToGradient, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
    if targets is None:
        return F.linear(hidden, head.weight)
    return summed_loss(hidden, head.weight, targets, to_gradient)


def summed_loss(hidden: Tensor, weight: Tensor, targets: Tensor, to_gradient: ToGradient | None = None) -> Tensor:
    """Summed negative log-likelihood (float64 scalar, nats) of `targets`, -100 not scored.

    `hidden` (positions, width), `weight` (vocabulary, width), `targets` (positions,) int64. The products are in the
    autocast's precision, else in the wider of the two tensors'; everything is summed in fp32 or better.
    """
    if not torch.is_grad_enabled():
        return token_losses(hidden, weight, targets).double().sum()
    dtype = _dtype(hidden, weight)
    if hidden.device.type == "cpu" and dtype != torch.float16:
        return by_vocabulary(hidden, weight, targets, dtype)
    return by_rows(hidden, weight, targets, dtype, to_gradient)


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What `summed_loss` sums, (positions,) in fp32, 0 where -100, without gradients."""
    dtype = _dtype(hidden, weight)
    if hidden.device.type == "cpu" and dtype != torch.float16:
        losses, scored = torch.zeros(len(targets)), targets != NOT_SCORED  # windows that overlap score half of them
        with torch.autocast("cpu", enabled=False):
            losses[scored] = _chunked(hidden[scored], weight.to(dtype), targets[scored])[0]
        return losses
    parts = zip(hidden.split(_TOGETHER), targets.split(_TOGETHER), strict=True)
    return torch.cat([_plain(rows, weight, wanted) for rows, wanted in parts])


def _plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight).float()  # (positions, vocabulary)
    return F.cross_entropy(logits, targets, ignore_index=NOT_SCORED, reduction="none")


def by_vocabulary(hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
    """`summed_loss` with products in `dtype` (fp32, bf16), its gradients made in chunks of the vocabulary."""
    share = 1 / len(targets)
    return _summed(hidden, weight, share, lambda: _chunked(hidden, weight.to(dtype), targets, share))


def by_rows(
    hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, to_gradient: ToGradient | None = None
) -> Tensor:
    """`summed_loss` with products in `dtype`, its gradients made in chunks of the positions.

    In fp16 the gradient of the sum, which has the range of probabilities: that of the mean would be lost below it.
    """
    share = 1.0 if dtype == torch.float16 else 1 / len(targets)
    passes = to_gradient or _to_gradient
    return _summed(hidden, weight, share, lambda: _chunks_of_rows(hidden.to(dtype), weight, targets, share, passes))


def _dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    if torch.is_autocast_enabled(hidden.device.type):
        return torch.get_autocast_dtype(hidden.device.type)
    return torch.promote_types(hidden.dtype, weight.dtype)


Graded = tuple[Tensor, Tensor | None, Tensor | None]  # losses by position, gradients by hidden and weight


def _summed(hidden: Tensor, weight: Tensor, share: float, make: Callable[[], Graded]) -> Tensor:
    with torch.autocast(hidden.device.type, enabled=False):
        total: Tensor = _GradedLoss.apply(hidden, weight, share, make)  # type: ignore[no-untyped-call]
        return total


class _GradedLoss(torch.autograd.Function):
    """The summed loss. `share` of its gradients is made in the forward: of the mean's, which training asks for."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, share: float, make: Callable[[], Graded]) -> Tensor:
        losses, of_hidden, of_weight = make()
        assert of_hidden is not None
        assert of_weight is not None
        ctx.gradients, ctx.share = (of_hidden, of_weight.to(weight.dtype)), share
        return losses.double().sum()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, Tensor, None, None]:
        of_hidden, of_weight = ctx.gradients
        del ctx.gradients  # the engine goes on in this memory
        scale = outer[0] / ctx.share
        # a GPU does not wait for the number: multiplying costs it less
        if scale.device.type != "cpu" or abs(scale.item() - 1) > 1e-12:
            of_hidden, of_weight = of_hidden.mul_(scale), of_weight.mul_(scale)
        return of_hidden, of_weight, None, None


def _chunks_of_rows(hidden: Tensor, weight: Tensor, targets: Tensor, share: float, to_gradient: ToGradient) -> Graded:
    words, width = weight.shape
    low = hidden.new_zeros(-(-words // _PADDED_TO) * _PADDED_TO, width)
    low[:words] = weight
    together = _chunk_of(len(hidden))
    # sums over the rows would be the first to leave fp16's range
    low_by = 1 / 16 if low.dtype == torch.float16 else 1.0
    of_weight: Tensor | None = None
    losses, of_hidden = [], []
    for rows, wanted in zip(hidden.split(together), targets.split(together), strict=True):
        logits = rows @ low.t()
        logits[:, words:] = -torch.inf  # what pads has no share, and a gradient of 0
        loss, gradient = to_gradient(logits, wanted, share)
        losses.append(loss)
        of_hidden.append(gradient @ low)
        product = (gradient.t() @ (rows if low_by == 1 else rows * low_by)).float()
        of_weight = product if of_weight is None else of_weight.add_(product)
        del logits, gradient, product  # before the next ones are made
    assert of_weight is not None
    return torch.cat(losses), torch.cat(of_hidden), (of_weight if low_by == 1 else of_weight / low_by)[:words]


def _chunk_of(positions: int) -> int:
    """Positions at once, at most _TOGETHER: all chunks of one shape where there is one, for they may be compiled."""
    chunks = -(-positions // _TOGETHER)
    even = next((number for number in range(chunks, 2 * chunks) if positions % number == 0), chunks)
    return -(-positions // even)


def _to_gradient(logits: Tensor, targets: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Losses (rows,) in fp32; `share` times the gradient of their sum by `logits` (rows, vocabulary), in their place.

    One tensor as large as they are in fp32 is made beside them, and few passes over it: they are what costs.
    """
    scored = targets != NOT_SCORED
    wanted = targets.clamp(min=0)[:, None]
    top, place = logits.max(1, keepdim=True)
    likely = logits.softmax(1, dtype=torch.float32)
    # the likeliest word's share, which is never 0, tells the sum of all exponentials
    own = logits.gather(1, wanted).float() - top.float() + likely.gather(1, place).log()
    losses = torch.where(scored, -own[:, 0], 0.0)
    likely.scatter_(1, wanted, own.expm1())  # no scatter_add: on a GPU its order is open
    torch.mul(likely, torch.where(scored, share, 0.0)[:, None], out=logits)
    return losses, logits


def _to_gradient_fused(logits: Tensor, targets: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The same to be compiled: on a GPU one kernel, which reads a row, reads it again from the cache, and writes it.

    To scatter, or to write to `logits`, would make several of it, and a tensor in fp32 between them.
    """
    scored = targets != NOT_SCORED
    wanted = targets.clamp(min=0)[:, None]
    likely = logits.log_softmax(1, dtype=torch.float32)
    losses = torch.where(scored, -likely.gather(1, wanted)[:, 0], 0.0)
    here = torch.arange(logits.shape[1], device=logits.device) == wanted
    gradient = (likely.exp() - here.float()) * torch.where(scored, share, 0.0)[:, None]
    return losses, gradient.to(logits.dtype)


def _chunked(hidden: Tensor, weight: Tensor, targets: Tensor, share: float = 0.0) -> Graded:
    """Losses by position, and `share` times their sum's gradients by hidden and weight where that is not 0; in fp32."""
    of_weight = torch.empty(weight.shape, dtype=torch.float32) if share else None
    losses, parts = [], []
    for first, (rows, wanted) in enumerate(zip(hidden.split(_ROWS), targets.split(_ROWS), strict=True)):
        loss, of_rows = _rows_loss(rows, weight, wanted, share, of_weight, add=first > 0)
        losses.append(loss)
        parts.append(of_rows)
    return torch.cat(losses), torch.cat([p for p in parts if p is not None]) if share else None, of_weight


def _rows_loss(
    rows: Tensor, weight: Tensor, targets: Tensor, share: float, of_weight: Tensor | None, *, add: bool
) -> tuple[Tensor, Tensor | None]:
    """Losses (rows,), their sum's gradient by `rows`; that by the weight is written to `of_weight`, or added to it."""
    low = rows.to(weight.dtype)
    scored = targets != NOT_SCORED
    wanted = targets.clamp(min=0)
    own = weight[wanted]  # (rows, width)
    # rounded as the product rounds it, so that the target's exponential is 1
    logit = (low.float() * own.float()).sum(1).to(weight.dtype).float()
    reference = logit
    sums, powers = _exponentials(low, weight, reference, keep=share != 0)
    if not bool((sums < _HIGHEST_SUM).all()):
        del powers
        reference = torch.stack([(low @ words.t()).amax(1) for words in weight.split(_CHUNK)]).amax(0).float()
        sums, powers = _exponentials(low, weight, reference, keep=share != 0)
    loss = torch.where(scored, sums.log() + (reference - logit), 0.0)
    if of_weight is None:
        return loss, None
    gain = torch.where(scored, share / sums, 0.0)[:, None]
    scaled = (low.float() * gain).to(weight.dtype)
    of_rows = torch.zeros(rows.shape, dtype=torch.float32)
    for power, words, into in zip(powers, weight.split(_CHUNK), of_weight.split(_CHUNK), strict=True):
        _multiply(of_rows, power, words, add=True)
        _multiply(into, power.t(), scaled, add=add)
    of_rows *= gain
    minus = torch.where(scored, -share, 0.0)[:, None]
    of_rows += own.float() * minus
    of_weight.index_add_(0, wanted, low.float() * minus)
    return loss, of_rows


def _multiply(into: Tensor, left: Tensor, right: Tensor, *, add: bool) -> None:
    """`left` @ `right`, whose products are rounded to their type, written or added to `into` in fp32."""
    if left.dtype == into.dtype:
        into.addmm_(left, right, beta=int(add))  # no memory in between; at 0 what was there is not read
    elif add:
        into.add_(left @ right)
    else:
        into.copy_(left @ right)


def _exponentials(rows: Tensor, weight: Tensor, reference: Tensor, *, keep: bool) -> tuple[Tensor, list[Tensor]]:
    """exp(logits - reference): its sum over the vocabulary (rows,) in fp32, and, to `keep`, the chunks of it.

    A few rows at a time, in one fp32 buffer that stays in the processor's cache: passes over memory are what costs.
    """
    sums = torch.zeros(len(rows))
    powers = []
    buffer = torch.empty(_TILE, _CHUNK)
    tiles = list(zip(sums.split(_TILE), reference[:, None].split(_TILE), strict=True))
    for words in weight.split(_CHUNK):
        logits = rows @ words.t()
        for (total, subtracted), tile in zip(tiles, logits.split(_TILE), strict=True):
            wide = tile if tile.dtype == buffer.dtype else buffer[: len(tile), : len(words)]
            total += torch.sub(tile, subtracted, out=wide).exp_().sum(1)
            if keep and wide is not tile:
                tile.copy_(wide)
        if keep:
            powers.append(logits)
    return sums, powers
