"""Which engine --engine auto takes, on real ranks. Run: pytest tests/test_build.py"""

from __future__ import annotations

import pytest
import torch

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


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_compile_is_to_be_asked_for(device: str) -> None:
    from wikift.build import choose_compile

    name, reason = choose_compile(TrainSettings(), torch.device(device))
    assert name == "eager"
    assert "--compile" in reason
    for asked, taken in ((True, "compiled"), (False, "eager")):
        assert choose_compile(TrainSettings(compile=asked), torch.device(device)) == Choice(taken, "asked for")
