"""One global batch on the ranks: micro-batch and accumulation follow from it, they never change it."""

from __future__ import annotations

from dataclasses import dataclass

from wikift.base.errors import UserError
from wikift.settings.fields import TrainSettings

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
    product = ranks * (micro or 1) * (accumulation or 1)
    total, exact = settings.global_batch_size, micro is not None and accumulation is not None
    asked = f"--global-batch-size {total}"
    if total is None:
        total = product if exact else DEFAULT_GLOBAL_BATCH
        asked = f"--global-batch-size {total}, the default"
    if total % product or (exact and total != product):
        factors = [_processes(ranks)]
        factors += [f"{micro} (--per-device-train-batch-size)"] if micro else []
        factors += [f"{accumulation} (--gradient-accumulation-steps)"] if accumulation else []
        text = " x ".join(factors) + (f" = {product}" if len(factors) > 1 else "")
        below = total // product * product or product
        fits = f"{product}" if exact else f"{below} or {below + product}"
        raise UserError(
            f"{asked}: must be {'' if exact else 'a multiple of '}{text}; take {fits}, or change another of these"
        )
    share = total // ranks
    free = micro is None and accumulation is None
    if free:
        micro = max(m for m in range(1, min(share, MICRO_BATCH_CEILING) + 1) if share % m == 0)
    micro = micro or share // (accumulation or 1)
    return BatchLayout(ranks, micro, share // micro, may_shrink=free)


def _processes(ranks: int) -> str:
    return f"{ranks} process{'es' if ranks > 1 else ''}"
