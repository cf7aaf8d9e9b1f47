"""The engine of a run: which one and why, compiled or not, and the construction of each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch._dynamo
from transformers import GPT2Config

from wikift.base.compiler import check_compiler, missing_for_compiling
from wikift.base.errors import UserError
from wikift.base.files import show_bytes
from wikift.base.shape import Shape
from wikift.base.world import World
from wikift.checkpoint.fragment import FragmentReader
from wikift.engines import memory
from wikift.engines.base import Compute, Engine
from wikift.engines.ddp import DDPEngine
from wikift.engines.optim import AdamSettings
from wikift.engines.single import SingleEngine
from wikift.model.gpt2 import make_model

ASKED_FOR = "asked for"
_FULL = 0.9  # part of the memory that an estimate may fill
# nanoGPT's README has 135 ms a step compiled and 250 eager: a minute of compiling is back after some 500 of those
_STEPS_TO_COMPILE = 1000


class Choice(NamedTuple):
    """What was taken (an engine: single, ddp, fsdp, zero1, zero2, zero3; compiled or eager), and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Work:
    """What an engine has to compute, and what was asked of it. `compile` is auto, yes or no."""

    engine: Choice  # auto, or one of Choice's
    compile: str
    shape: Shape
    block_size: int  # tokens
    micro_batch: int  # blocks
    accumulation: int
    steps: int
    precision: str  # bf16, fp16 or fp32
    gradient_checkpointing: bool
    fsdp_reshard: bool
    reduce_dtype: str
    adam: AdamSettings
    zero_config: dict[str, Any]  # complete, for deepspeed.initialize; empty for other engines


@dataclass(frozen=True)
class Built:
    """An engine that is ready for the next step, and why it is this one."""

    engine: Engine
    choice: Choice
    compiled: Choice  # compiled, or eager


def build_engine(work: Work, config: GPT2Config, reader: FragmentReader, world: World) -> Built:
    """The engine for `work` with the weights and optimizer state that `reader` has; collective."""
    if work.compile == "yes":
        check_compiler(world.device.type)
    choice = choose_engine(work, world)
    if not work.fsdp_reshard and choice.name != "fsdp":
        raise UserError(
            f"--no-fsdp-reshard: has no effect, --engine auto takes {choice.name} here ({choice.reason}); "
            "omit it, or use --engine fsdp"
        )
    compiled = choose_compile(work, world.device)
    if compiled.name == "compiled" and compiled.reason != ASKED_FOR:
        torch._dynamo.config.suppress_errors = True  # a default must not end a run: it continues eagerly
    engine = _construct(choice.name, work, config, world, compile=compiled.name == "compiled")
    engine.restore(reader)
    return Built(engine, choice, compiled)


def choose_engine(work: Work, world: World) -> Choice:
    """The engine, the same on every rank; collective."""
    if work.engine.name != "auto":
        return work.engine
    if world.size == 1:
        return Choice("single", "one process")
    need = memory.training_bytes(
        work.shape, block_size=work.block_size, micro_batch=work.micro_batch, precision=work.precision,
        checkpointing=work.gradient_checkpointing, on_cpu=world.device.type == "cpu",
    )  # fmt: skip
    have = memory.available_bytes(world)
    if work.accumulation > 1:
        need += 4 * work.shape.parameters  # what is accumulated, beside DDP's buckets
    full = world.highest(int(have is not None and need > _FULL * have))
    if full:
        return Choice("fsdp", f"DDP would need about {show_bytes(need)} per process, more than is available")
    return Choice("ddp", f"{world.size} processes, about {show_bytes(need)} per process fits")


def choose_compile(work: Work, device: torch.device) -> Choice:
    """Whether torch.compile is used, the same on every rank and whenever the run is resumed."""
    if work.compile != "auto":
        return Choice("compiled" if work.compile == "yes" else "eager", ASKED_FOR)
    if device.type == "cpu":
        # measured in fp32, 3 to 12 layers: -3 to +2% of a step, and 25 s to start (docs/explanation/experiments.md)
        return Choice("eager", "a CPU gains nothing from --compile")
    if work.zero_config:
        return Choice("eager", "off by default with DeepSpeed")
    if work.steps < _STEPS_TO_COMPILE:
        return Choice("eager", f"--compile pays off from {_STEPS_TO_COMPILE:,} steps")
    if missing := missing_for_compiling(device.type):
        return Choice("eager", f"--compile would need {missing}")
    return Choice("compiled", f"{work.steps:,} steps on a GPU")


def _construct(name: str, work: Work, config: GPT2Config, world: World, *, compile: bool) -> Engine:
    make = partial(make_model, config, gradient_checkpointing=work.gradient_checkpointing)
    compute = Compute(work.accumulation, work.precision, compile, work.reduce_dtype)
    if name.startswith("zero"):
        from wikift.engines.zero import ZeroEngine

        return ZeroEngine(make, work.adam, world, work.zero_config, compute)
    with torch.device("meta"):
        model = make()
    if name == "fsdp":
        from wikift.engines.fsdp import FSDPEngine

        return FSDPEngine(model, work.adam, world, compute, reshard=work.fsdp_reshard)
    single = SingleEngine(model, work.adam, world.device, compute, world.size)
    return single if name == "single" else DDPEngine(single, world, work.block_size, work.reduce_dtype)
