"""What an engine has to compute: settings ask for it, training resolves it, engines do it. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from wikift.base.shape import Shape


@dataclass(frozen=True)
class AdamSettings:
    """What the optimizer and clipping need; `max_grad_norm` 0 is no clipping."""

    weight_decay: float
    beta1: float
    beta2: float
    epsilon: float
    max_grad_norm: float


class Choice(NamedTuple):
    """What was taken (an engine: single, ddp, fsdp, zero1, zero2, zero3; compiled or eager), and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Work:
    """What an engine has to compute, and what was asked of it. `compile` is auto, yes or no."""

    engine: Choice  # auto until `choose`
    compile: str
    shape: Shape
    block_size: int  # tokens
    micro_batch: int  # blocks
    accumulation: int
    may_shrink: bool  # the micro-batch, where memory is short
    steps: int
    precision: str  # bf16, fp16 or fp32; auto or tf32 until it is resolved
    gradient_checkpointing: bool
    fsdp_reshard: bool
    residual_dtype: str
    reduce_dtype: str
    adam: AdamSettings
    zero_config: dict[str, Any]  # complete, for deepspeed.initialize; empty for other engines
    save_aside: bool
