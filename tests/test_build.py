"""Which engine --engine auto takes, on real ranks. Run: pytest tests/test_build.py"""

from __future__ import annotations

import os
import sys

from tests.ranks import run_ranks
from wikift.build import Choice
from wikift.config import TrainSettings
from wikift.derive import Plan
from wikift.placement import Placement
from wikift.shape import Shape


def chosen(shape: Shape, engine: str) -> Choice:
    from wikift.build import choose
    from wikift.world import start_world

    world = start_world("cpu")
    plan = Plan(Placement(world.size, 1, 1), shape, 1024, 10, 10, 0)
    return choose(TrainSettings(engine=engine), plan, world, "fp32")


def test_auto_by_processes_and_memory() -> None:
    small = Shape(n_layer=2, n_head=2, n_embd=32, vocab_size=97)
    assert run_ranks(chosen, 1, small, "auto") == [Choice("single", "one process")]
    for choice in run_ranks(chosen, 2, small, "auto"):
        assert choice.name == "ddp"
        assert choice.reason.startswith("2 processes, and about")
    huge = Shape(n_layer=480, n_head=25, n_embd=16000)  # 1.5 trillion weights fit nowhere
    for choice in run_ranks(chosen, 2, huge, "auto"):
        assert choice.name == "fsdp"
        assert "more than there is" in choice.reason
    assert [choice.name for choice in run_ranks(chosen, 2, huge, "ddp")] == ["ddp"] * 2, "asked for is asked for"


def compiled(steps: int, compile: bool | None, precision: str = "fp32", compiler: str = sys.executable) -> Choice:
    from wikift.build import choose_compile
    from wikift.world import start_world

    os.environ["CXX"] = compiler
    world = start_world("cpu")
    plan = Plan(Placement(world.size, 1, 1), Shape(n_layer=2, n_head=2, n_embd=64), 1024, 10, steps, 0)
    return choose_compile(TrainSettings(compile=compile), plan, world, precision)


def test_compile_where_the_run_is_long_enough() -> None:
    (short,) = run_ranks(compiled, 1, 10, None)
    assert short.name == "eager"
    assert "would not pay" in short.reason
    assert [choice.name for choice in run_ranks(compiled, 2, 10_000_000, None)] == ["compiled"] * 2
    assert run_ranks(compiled, 1, 10_000_000, False) == [Choice("eager", "asked for")]
    (low,) = run_ranks(compiled, 1, 10_000_000, None, "bf16")
    assert low == Choice("eager", "in bf16 a CPU gains nothing from --compile")
    assert run_ranks(compiled, 1, 10, True) == [Choice("compiled", "asked for")]
    (without,) = run_ranks(compiled, 1, 10_000_000, None, "fp32", "no-such-compiler")
    assert without == Choice("eager", "no C++ compiler is found")
