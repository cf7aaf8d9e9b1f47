"""The engine of a run: which one and why, the model inside it, and what it starts from."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._dynamo
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from wikift.base.errors import UserError
from wikift.base.shape import parse_overrides
from wikift.base.sizes import show_bytes
from wikift.base.world import World
from wikift.checkpoint.fragment import FreshStart
from wikift.checkpoint.reader import Checkpoint
from wikift.engines import memory
from wikift.engines.base import Engine
from wikift.engines.ddp import DDPEngine
from wikift.engines.optim import AdamSettings
from wikift.engines.single import SingleEngine
from wikift.model.gpt2 import Precision, load_config, load_generation_config, make_model, model_config, parameter_shapes
from wikift.model.initial_weights import random_weights, trained_weights
from wikift.settings import deepspeed as dsconfig
from wikift.settings import deepspeed_checks as dscheck
from wikift.settings.fields import TrainSettings
from wikift.settings.run_plan import Plan

ASKED_FOR = "asked for"
_FULL = 0.9  # part of the memory that an estimate may fill
# nanoGPT's README has 135 ms a step compiled and 250 eager: a minute of compiling is back after some 500 of those
_STEPS_TO_COMPILE = 1000


class Choice(NamedTuple):
    """What was taken (an engine: single, ddp, fsdp, zero1, zero2, zero3; compiled or eager), and why."""

    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Built:
    """A run's engine, ready for the next step, and what describes its model."""

    engine: Engine
    choice: Choice
    compiled: Choice  # compiled, or eager
    config: GPT2Config
    generation_config: GenerationConfig
    shapes: dict[str, tuple[int, ...]]  # of every parameter, by Hugging Face name


def build(
    settings: TrainSettings,
    plan: Plan,
    world: World,
    precision: Precision,
    eos_token_id: int,
    start: Checkpoint | None,
    say: Callable[[str], None],
) -> Built:
    """The engine that the settings ask for, new or as `start` left it; collective."""
    if settings.compile:
        check_compiler(world.device)
    choice = choose(settings, plan, world, precision.name)
    if not settings.fsdp_reshard and choice.name != "fsdp":
        raise UserError(
            f"--no-fsdp-reshard: cannot act, --engine auto takes {choice.name} here ({choice.reason}); "
            "leave it out, or use --engine fsdp"
        )
    compiled = choose_compile(settings, world.device, plan.steps)
    if compiled.name == "compiled" and compiled.reason != ASKED_FOR:
        torch._dynamo.config.suppress_errors = True  # what nobody asked for may not end a run: it goes on eagerly
    config = _config(settings, plan, eos_token_id, start)
    if start is None and not settings.from_scratch:
        config, weight = trained_weights(settings.model, config, "--model", say)
    make = partial(make_model, config, gradient_checkpointing=settings.gradient_checkpointing)
    with torch.device("meta"):
        model = make()
    shapes = parameter_shapes(model)
    engine = _engine(choice.name, settings, plan, world, precision.name, compiled.name == "compiled", model, make)
    if settings.from_scratch:
        weight = random_weights(config, shapes, settings.seed)
    engine.restore(FreshStart(weight) if start is None else start)
    scratch = settings.from_scratch or start is not None
    generation = (
        GenerationConfig.from_model_config(config) if scratch else load_generation_config(settings.model, config)
    )
    return Built(engine, choice, compiled, config, generation, shapes)


def choose(settings: TrainSettings, plan: Plan, world: World, precision: str) -> Choice:
    """The engine, the same on every rank; collective."""
    if settings.deepspeed is not None:
        stage = dscheck.stage(dsconfig.read(settings.deepspeed))
        return Choice(f"zero{stage}", f"stage {stage} in {settings.deepspeed}")
    if settings.engine != "auto":
        return Choice(settings.engine, ASKED_FOR)
    if world.size == 1:
        return Choice("single", "one process")
    need = memory.training_bytes(
        plan.shape, block_size=plan.block_size, micro_batch=plan.place.micro_batch, precision=precision,
        checkpointing=settings.gradient_checkpointing, on_cpu=world.device.type == "cpu",
    )  # fmt: skip
    have = memory.available_bytes(world)
    if plan.place.accumulation > 1:
        need += 4 * plan.shape.parameters  # what is accumulated, beside DDP's buckets
    full = world.highest(int(have is not None and need > _FULL * have))
    if full:
        return Choice("fsdp", f"whole on each process it would take about {show_bytes(need)}, more than there is")
    return Choice("ddp", f"{world.size} processes, and about {show_bytes(need)} fit into each")


def choose_compile(settings: TrainSettings, device: torch.device, steps: int) -> Choice:
    """Whether torch.compile is used, the same on every rank and whenever the run is resumed."""
    if settings.compile is not None:
        return Choice("compiled" if settings.compile else "eager", ASKED_FOR)
    if device.type == "cpu":
        # measured in fp32, 3 to 12 layers: -3 to +2% of a step, and 25 s to start (docs/experiments.md)
        return Choice("eager", "a CPU gains nothing from --compile")
    if settings.deepspeed is not None:
        return Choice("eager", "with DeepSpeed --compile is to be asked for")
    if steps < _STEPS_TO_COMPILE:
        return Choice("eager", f"--compile pays from {_STEPS_TO_COMPILE:,} steps on")
    if missing := _missing_for_compiling(device):
        return Choice("eager", f"--compile would need {missing}")
    return Choice("compiled", f"{steps:,} steps on a GPU")


def _engine(
    name: str,
    settings: TrainSettings,
    plan: Plan,
    world: World,
    precision: str,
    compile: bool,
    model: GPT2LMHeadModel,
    make: Callable[[], GPT2LMHeadModel],
) -> Engine:
    adam = AdamSettings(
        settings.weight_decay, settings.adam_beta1, settings.adam_beta2, settings.adam_epsilon, settings.max_grad_norm,
    )  # fmt: skip
    accumulation = plan.place.accumulation
    if name == "fsdp":
        from wikift.engines.fsdp import FSDPEngine

        return FSDPEngine(
            model, adam, world, accumulation=accumulation, precision=precision, compile=compile,
            reshard=settings.fsdp_reshard, reduce_dtype=settings.reduce_dtype,
        )  # fmt: skip
    if name.startswith("zero"):
        from wikift.engines.zero import ZeroEngine

        assert settings.deepspeed is not None
        config = dsconfig.engine_config(
            dsconfig.read(settings.deepspeed), micro_batch=plan.place.micro_batch, accumulation=accumulation,
            ranks=world.size, precision=precision, max_grad_norm=settings.max_grad_norm, hidden_size=plan.shape.n_embd,
            reduce_dtype=settings.reduce_dtype,
        )  # fmt: skip
        return ZeroEngine(make, adam, world, config, precision=precision, compile=compile)
    single = SingleEngine(
        model, adam, world.device, accumulation=accumulation, precision=precision, compile=compile, ranks=world.size
    )
    if name == "single":
        return single
    return DDPEngine(single, world, plan.block_size, settings.reduce_dtype)


def _config(settings: TrainSettings, plan: Plan, eos_token_id: int, start: Checkpoint | None) -> GPT2Config:
    words: dict[str, Any]
    if start is not None:
        words = start.manifest["model_config"]
    elif settings.from_scratch:
        words = {**dataclasses.asdict(plan.shape), **parse_overrides(settings.config_overrides or "")}
        words |= {"bos_token_id": eos_token_id, "eos_token_id": eos_token_id}
    else:
        words = load_config(settings.model).to_dict()
    if settings.dropout is not None:
        words = words | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), settings.dropout)
    return model_config(words)


def _missing_for_compiling(device: torch.device) -> str | None:
    """What torch.compile lacks here: it calls g++ for a CPU, and triton a C compiler with Python's headers."""
    on_cpu = device.type == "cpu"
    names = [os.environ.get("CXX", "g++")] if on_cpu else [os.environ.get("CC", "gcc"), "clang"]
    if not any(map(shutil.which, names)):
        return f"a compiler, {' or '.join(names)} is not found (Debian: apt install g++)"
    if not on_cpu and importlib.util.find_spec("triton") is None:
        return "triton, which comes with torch's builds for CUDA on Linux"
    if not on_cpu and not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "Python's headers (Debian: apt install python3-dev)"
    return None


def check_compiler(device: torch.device) -> None:
    """Raises UserError where torch.compile would end in a traceback."""
    if missing := _missing_for_compiling(device):
        raise UserError(f"--compile: needs {missing}; install it or leave --compile out")
