"""Any engine around a tiny GPT-2 with random weights, in a rank that tests/ranks.py started."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from tests.tiny import VOCABULARY
from wikift.base.world import World
from wikift.engines.base import Compute, Engine
from wikift.engines.optim import AdamSettings
from wikift.settings.batch_layout import BatchLayout

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
    from wikift.engines.ddp import DDPEngine
    from wikift.engines.fsdp import FSDPEngine
    from wikift.engines.single import SingleEngine
    from wikift.engines.zero import ZeroEngine
    from wikift.model.gpt2 import make_model
    from wikift.settings import deepspeed as dsconfig

    make = partial(make_model, config, gradient_checkpointing=checkpointing)
    compute = Compute(accumulation, precision, compile, reduce_dtype, residual_dtype)
    if kind.startswith("zero"):
        stage = int(kind.removeprefix("zero"))
        whole = dsconfig.engine_config(
            {"zero_optimization.stage": stage} if ds_config is None else ds_config,
            BatchLayout(world.size, micro, accumulation), precision, max_grad_norm=adam.max_grad_norm,
            hidden_size=config.n_embd, reduce_dtype=reduce_dtype,
        )  # fmt: skip
        return ZeroEngine(make, adam, world, whole, compute)
    with torch.device("meta"):
        model = make()
    if kind == "fsdp":
        return FSDPEngine(model, adam, world, compute, reshard=reshard)
    single = SingleEngine(model, adam, world.device, compute, world.size)
    return DDPEngine(single, world, BLOCK, reduce_dtype) if kind == "ddp" else single


def random_start(config: Any, seed: int = 7) -> Any:
    """A FragmentReader of random weights and an optimizer that has made no step."""
    from wikift.checkpoint.fragment import FreshStart
    from wikift.model.gpt2 import make_model, parameter_shapes
    from wikift.model.initial_weights import random_weights

    with torch.device("meta"):
        shapes = parameter_shapes(make_model(config))
    return FreshStart(random_weights(config, shapes, seed))
