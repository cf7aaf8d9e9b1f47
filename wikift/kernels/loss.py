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
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wikift import kernels

NOT_SCORED = -100
_CHUNK = 2048  # vocabulary entries whose logits are held in fp32 at once
_TILE = 128  # rows of them that are worked on at once: 1 MB, which stays in a cache
_ROWS = 2048  # positions whose exponentials are kept at once: 206 MB in bf16 at GPT-2's vocabulary
_LOGIT = 10  # bytes of one while chunks of the rows are worked on: in bf16, and twice in fp32
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
    low, parts = weight if kernels.plain else _padded(weight, dtype), _chunks(hidden.to(dtype), targets, weight)
    return torch.cat([plain_losses(rows, low, wanted, len(weight)) for rows, wanted in parts])


def plain_losses(hidden: Tensor, weight: Tensor, targets: Tensor, entries: int | None = None) -> Tensor:
    """`token_losses`, with gradients, as torch computes them; over the first `entries` of the vocabulary."""
    logits = F.linear(hidden, weight)[:, :entries].float()  # (positions, vocabulary)
    return F.cross_entropy(logits, targets, ignore_index=NOT_SCORED, reduction="none")  # (positions,)


def graded_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, to_gradient: ToGradient | None
) -> Tensor:
    """`summed_loss` with matmuls in `dtype`, in chunks of the positions by `to_gradient`, else of the vocabulary.

    In fp16 the gradient of the sum, which has the range of probabilities: that of the mean would be lost below it.
    """
    factor = 1.0 if dtype == torch.float16 else 1 / len(targets)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        if to_gradient is None:
            graded = _chunked(hidden, weight.to(dtype), targets, factor)
        else:
            graded = _chunks_of_rows(hidden.to(dtype), weight, targets, factor, to_gradient)
    return _GradedLoss.apply(hidden, weight, graded, factor)  # type: ignore[no-any-return, no-untyped-call]


def _dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    if torch.is_autocast_enabled(hidden.device.type):
        return torch.get_autocast_dtype(hidden.device.type)
    return torch.promote_types(hidden.dtype, weight.dtype)


class _GradedLoss(torch.autograd.Function):
    """The sum of losses that were computed with `factor` times its gradients: the mean's, which training asks for."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, graded: Graded, factor: float) -> Tensor:
        losses, of_hidden, of_weight = graded
        assert of_weight is not None
        ctx.gradients, ctx.factor = (of_hidden, of_weight.to(weight.dtype)), factor
        return losses.double().sum()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, of_weight = ctx.gradients  # (positions, width), (vocabulary, width)
        del ctx.gradients  # the engine adds to this memory
        scale = outer[0] / ctx.factor
        # a GPU does not wait for the number: multiplying costs it less
        if scale.device.type != "cpu" or not abs(scale.item() - 1) <= 1e-12:  # NaN too
            of_hidden, of_weight = of_hidden.mul_(scale), of_weight.mul_(scale)
        return of_hidden, of_weight, None, None


def _chunks_of_rows(hidden: Tensor, weight: Tensor, targets: Tensor, factor: float, to_gradient: ToGradient) -> Graded:
    entries, low, losses, of_hidden = len(weight), _padded(weight, hidden.dtype), [], []
    of_weight = torch.zeros_like(low, dtype=torch.float32)
    for rows, wanted in _chunks(hidden, targets, weight):
        logits = rows @ low.t()  # (rows, padded vocabulary)
        logits[:, entries:] = -torch.inf  # padding has a probability, and a gradient, of 0
        loss, gradient = to_gradient(logits, wanted, factor)  # (rows,), (rows, padded vocabulary)
        losses.append(loss)
        of_hidden.append(gradient @ low)  # (rows, width)
        _add_product(of_weight, gradient.t(), rows)  # (padded vocabulary, rows) @ (rows, width)
        del logits, gradient  # before the next ones are made
    return torch.cat(losses), torch.cat(of_hidden), of_weight[:entries]


def _padded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` in `dtype`, with as many entries, of zeros at the end, as a GPU's matmuls want."""
    padded = weight.new_zeros(-(-len(weight) // _PADDED_TO) * _PADDED_TO, weight.shape[1], dtype=dtype)
    padded[: len(weight)] = weight
    return padded


def _chunks(hidden: Tensor, targets: Tensor, weight: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    together = positions_at_once(len(hidden), len(weight), gpu_bytes(hidden.device))
    return zip(hidden.split(together), targets.split(together), strict=True)


def positions_at_once(positions: int, entries: int, gpu: int) -> int:
    """Of `positions` those whose logits take a sixteenth of a GPU's `gpu` bytes, or 2 GB (0); halved, for one shape."""
    # of all its bytes, not of those that are free: a resumed run rounds alike
    while positions * _LOGIT * entries > (gpu // 16 or 2 << 30) and positions > 1:
        positions = -(-positions // 2)
    return positions


def gpu_bytes(device: torch.device) -> int:
    """A GPU's memory; 0 of a CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


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
    """Add `left` @ `right` to `into` in fp32; on a CPU in bf16 rounded first, for torch has no other there."""
    if left.is_cuda and left.dtype != into.dtype:
        torch.addmm(into, left, right, out_dtype=into.dtype, out=into)
    elif left.dtype == torch.bfloat16:
        into.add_(left @ right)
    else:  # fp16's own sums would leave its range
        into.addmm_(left.to(into.dtype), right.to(into.dtype))


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
