"""One global batch on the ranks: micro-batch and accumulation follow from it, they never change it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from wikift.base.errors import UserError
from wikift.settings.fields import TrainSettings
from wikift.settings.options import flag

DEFAULT_GLOBAL_BATCH = 32  # run_clm.py's 8 per device on the 4 devices of the usual torchrun command
MICRO_BATCH_CEILING = 64


@dataclass(frozen=True)
class BatchLayout:
    """How one global batch is split over the ranks: `global_batch = ranks * micro_batch * accumulation` blocks."""

    ranks: int
    micro_batch: int
    accumulation: int
    may_shrink: bool = False  # the micro-batch is the largest, and becomes what memory has room for

    @property
    def global_batch(self) -> int:
        return self.ranks * self.micro_batch * self.accumulation

    @property
    def words(self) -> str:
        if self.may_shrink:
            blocks = f"{self.micro_batch} blocks at once, fewer where memory is short"
            return f"{self.global_batch} blocks per step, {_processes(self.ranks)}, up to {blocks}"
        return (
            f"{self.global_batch} blocks per step = {_processes(self.ranks)} x {self.micro_batch} blocks x "
            f"{self.accumulation} accumulation steps"
        )


def batch_layout(settings: TrainSettings, ranks: int) -> BatchLayout:
    """Fit the global batch on `ranks`. Raises UserError with the arithmetic where it cannot be.

    The global batch is `--global-batch-size`, else the product where both of its parts are given, else 32.
    """
    micro, accumulation = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    total, asked = settings.global_batch_size, f"--global-batch-size {settings.global_batch_size}"
    if total is None:
        total = ranks * micro * accumulation if micro and accumulation else DEFAULT_GLOBAL_BATCH
        asked = f"--global-batch-size {total}, the default"
    if total % ranks:
        fits = f"{total // ranks * ranks or ranks} or {(total // ranks + 1) * ranks}"
        raise UserError(
            f"{asked}: must be a multiple of the {ranks} processes; "
            f"take {fits}, or a number of processes that divides {total}"
        )
    share = total // ranks
    if micro and accumulation and micro * accumulation != share:
        raise UserError(
            f"{asked}: is not {_processes(ranks)} x {micro} (--per-device-train-batch-size) x {accumulation} "
            f"(--gradient-accumulation-steps) = {ranks * micro * accumulation}; remove one of the three"
        )
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        value = getattr(settings, name)
        if value and share % value:
            raise UserError(
                f"{flag(name)} {value}: must divide the {share} blocks per step of each process ({asked}; "
                f"{_processes(ranks)}); take {_nearest_divisors(share, value)}, or another --global-batch-size"
            )
    free = micro is None and accumulation is None
    if free:
        micro = max(m for m in range(1, min(share, MICRO_BATCH_CEILING) + 1) if share % m == 0)
    micro = micro or share // (accumulation or 1)
    # FSDP2 would add up several micro-batches in the format of the reduction
    summed = settings.fsdp_reshard or settings.reduce_dtype == "fp32"
    return BatchLayout(ranks, micro, share // micro, may_shrink=free and summed)


def _processes(ranks: int) -> str:
    return f"{ranks} process{'es' if ranks > 1 else ''}"


def _nearest_divisors(number: int, near: int) -> str:
    """The divisors of `number` on both sides of `near`, which is none: `4 or 8`."""
    small = [d for d in range(1, min(math.isqrt(number), 10**6) + 1) if number % d == 0]
    divisors = sorted({*small, *(number // d for d in small)})
    around = [max(d for d in divisors if d < near), *[d for d in divisors if d > near][:1]]
    return " or ".join(map(str, around))
