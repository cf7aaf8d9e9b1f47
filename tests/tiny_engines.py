"""Any engine around a tiny GPT-2 with random weights, in a rank that tests/ranks.py started."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from tests.tiny import VOCABULARY
from wikift.base.shape import Shape
from wikift.base.work import AdamSettings, Choice, Work
from wikift.base.world import World
from wikift.engines.base import Engine
from wikift.settings.deepspeed import engine_config

BLOCK = 8
SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 16, "vocab_size": VOCABULARY}
ENGINES = ("single", "ddp", "fsdp", "zero1", "zero2", "zero3")
# The gradient of a key's bias is zero in exact arithmetic (softmax does not see it), so what comes is rounding; Adam
# makes whole steps of it unless epsilon lies above it.
ADAM = AdamSettings(weight_decay=0.1, beta1=0.9, beta2=0.95, epsilon=1e-6, max_grad_norm=0.5)


def tiny_config(dropout: float = 0.0, **shape: int) -> Any:
    from wikift.model.gpt2 import model_config

    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    return model_config({**SHAPE, **shape, **rates, "bos_token_id": 0, "eos_token_id": 0})


def make_engine(
    kind: str,
    world: World,
    config: Any,
    *,
    micro: int = 1,
    accumulation: int = 1,
    precision: str = "fp32",
    adam: AdamSettings = ADAM,
    compile: bool = False,
    reshard: bool = True,
    checkpointing: bool = False,
    reduce_dtype: str = "fp32",
    residual_dtype: str = "fp32",
    ds_config: dict[str, Any] | None = None,
) -> Engine:
    """An engine whose weights are open: restore it from something."""
    from wikift.engines.build import construct

    work = Work(
        Choice(kind, ""), "no", Shape(n_embd=config.n_embd), BLOCK, micro, accumulation, may_shrink=False, steps=1,
        precision=precision, gradient_checkpointing=checkpointing, fsdp_reshard=reshard, residual_dtype=residual_dtype,
        reduce_dtype=reduce_dtype, adam=adam, zero_config={}, save_aside=False,
    )  # fmt: skip
    if kind.startswith("zero"):
        asked = {"zero_optimization.stage": int(kind[4])} if ds_config is None else ds_config
        work = replace(work, zero_config=engine_config(asked, work, world.size))
    return construct(work, config, world, compile=compile)


def random_start(config: Any, seed: int = 7) -> Any:
    """A FragmentReader of random weights and an optimizer that has made no step."""
    from wikift.checkpoint.fragment import FreshStart
    from wikift.model.gpt2 import make_model, parameter_shapes
    from wikift.model.initial_weights import random_weights

    with torch.device("meta"):
        shapes = parameter_shapes(make_model(config))
    return FreshStart(random_weights(config, shapes, seed))
