"""The engine of a run: which one and why, compiled or not, and the construction of each."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch._dynamo
from transformers import GPT2Config

from wikift.base.errors import UserError
from wikift.base.files import show_bytes
from wikift.base.work import Choice, Work
from wikift.base.world import World
from wikift.checkpoint.fragment import FragmentReader
from wikift.engines.base import Engine
from wikift.engines.ddp import DDPEngine
from wikift.engines.memory import Machine, training_bytes, ways_out
from wikift.engines.single import SingleEngine
from wikift.model.gpt2 import make_model

ASKED_FOR = "asked for"
# of a CPU's micro-batch: with more it is no faster (docs/explanation/experiments.md), and a stop waits for its end
_CPU_TOKENS, _CPU_FLOPS = 2048, 1e12
# nanoGPT's README has 135 ms a step compiled and 250 eager: a minute of compiling is back after some 500 of those
_STEPS_TO_COMPILE = 1000


def build_engine(work: Work, config: GPT2Config, reader: FragmentReader, world: World) -> tuple[Engine, Choice]:
    """The engine chosen for `work` with the state that `reader` has; and compiled or eager, and why. Collective."""
    if work.compile == "yes" and (missing := missing_for_compiling(world.device.type)):
        raise UserError(f"--compile: needs {missing}; install it or omit --compile")
    compiled = choose_compile(work, world.device)
    if compiled.name == "compiled" and compiled.reason != ASKED_FOR:
        torch._dynamo.config.suppress_errors = True  # a default must not end a run: it continues eagerly
    engine = construct(work, config, world, compile=compiled.name == "compiled")
    engine.restore(reader)
    return engine, compiled


def choose(work: Work, machine: Machine, before: tuple[str, int] | None = None) -> Work:
    """`work` with an engine, a micro-batch, and whether checkpoints are written aside, that fit.

    DDP comes before FSDP, then the largest micro-batch; buffers for checkpoints, of a CPU's memory, are the first to
    go. `before` is the engine and the micro-batch of a resumed run: taken again where they fit, for with them the same
    masks are drawn. Raises UserError where nothing fits.
    """
    asked, (ranks, _, gpu, room), share = work.engine.name, machine, work.micro_batch * work.accumulation
    sizes = [n for n in range(work.micro_batch, 0, -1) if share % n == 0]
    if not gpu:
        most = min(_CPU_TOKENS, _CPU_FLOPS / work.shape.flops_per_token(work.block_size))
        sizes = [n for n in sizes if n * work.block_size <= most] or [1]
    if not work.may_shrink:
        sizes = [work.micro_batch]
    engines = [asked] if asked != "auto" else ["single"] if ranks == 1 else ["ddp", "fsdp"]
    options = [(engine, size) for engine in engines for size in sizes]
    ways = [
        replace(work, engine=Choice(name, ""), micro_batch=n, accumulation=share // n, save_aside=aside)
        for name, n in [option for option in options if option == before] + options
        for aside in ([True, False] if work.save_aside and not gpu else [work.save_aside])
    ]
    way = next((way for way in ways if training_bytes(way, ranks, gpu=gpu) <= room), ways[-1])
    need, name = training_bytes(way, ranks, gpu=gpu), way.engine.name
    if need > room and work.may_shrink:
        raise UserError(
            f"--per-device-train-batch-size {way.micro_batch}, the least: needs about {show_bytes(need)} per process "
            f"with engine {name}, and {show_bytes(room)} is available; take {ways_out(way, machine)}, or set it to try "
            "all the same"
        )
    why = work.engine.reason if asked != "auto" else "one process" if name == "single" else f"{ranks} processes"
    why += f", about {show_bytes(need)} of {show_bytes(room)} each"
    why += ": it may run out of memory" if need > room else ""
    why += ", DDP needs more" if name == "fsdp" and asked == "auto" else ""
    why += ", no buffers for checkpoints" if way.save_aside != work.save_aside else ""
    if not work.fsdp_reshard and name != "fsdp":
        raise UserError(
            f"--no-fsdp-reshard: has no effect, --engine auto takes {name} here ({why}); omit it, or use --engine fsdp"
        )
    return replace(way, engine=Choice(name, why), may_shrink=False)


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


def missing_for_compiling(device_type: str) -> str | None:
    """What torch.compile lacks here: it calls g++ for a CPU, and triton a C compiler with Python's headers."""
    on_cpu = device_type == "cpu"
    names = [os.environ.get("CXX", "g++")] if on_cpu else [os.environ.get("CC", "gcc"), "clang"]
    if not any(map(shutil.which, names)):
        return f"a compiler, {' or '.join(names)} is not found (Debian: apt install g++)"
    if not on_cpu and importlib.util.find_spec("triton") is None:
        return "triton, which comes with torch's builds for CUDA on Linux"
    if not on_cpu and not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "Python's headers (Debian: apt install python3-dev)"
    return None


def construct(work: Work, config: GPT2Config, world: World, *, compile: bool) -> Engine:
    """The engine named in `work`; its weights are undefined until `restore`."""
    make, name = partial(make_model, config, gradient_checkpointing=work.gradient_checkpointing), work.engine.name
    if name.startswith("zero"):
        from wikift.engines.zero import ZeroEngine

        return ZeroEngine(make, work, world, compile=compile)
    with torch.device("meta"):
        model = make()
    if name == "fsdp":
        from wikift.engines.fsdp import FSDPEngine

        return FSDPEngine(model, work, world, compile=compile)
    single = SingleEngine(model, work, world, compile=compile)
    return single if name == "single" else DDPEngine(single, world)
