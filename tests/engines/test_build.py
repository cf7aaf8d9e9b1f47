"""Which engine --engine auto takes, on real ranks. Run: pytest tests/engines/test_build.py"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from wikift.base import compiler
from wikift.base.shape import Shape
from wikift.engines import build
from wikift.engines.build import Choice, Work, choose_engine
from wikift.engines.optim import AdamSettings

WORK = Work(
    engine=Choice("auto", ""), compile="auto", shape=Shape(), block_size=1024, micro_batch=1, accumulation=1, steps=10,
    precision="fp32", gradient_checkpointing=False, fsdp_reshard=True, reduce_dtype="fp32",
    adam=AdamSettings(0.0, 0.9, 0.999, 1e-8, 1.0), zero_config={},
)  # fmt: skip


def chosen(shape: Shape, engine: str) -> Choice:
    from wikift.base.world import start_world

    return choose_engine(replace(WORK, shape=shape, engine=Choice(engine, "asked for")), start_world("cpu"))


def test_auto_by_processes_and_memory() -> None:
    small = Shape(n_layer=2, n_head=2, n_embd=32, vocab_size=97)
    assert run_ranks(chosen, 1, small, "auto") == [Choice("single", "one process")]
    for choice in run_ranks(chosen, 2, small, "auto"):
        assert choice.name == "ddp"
        assert choice.reason.startswith("2 processes, about")
    huge = Shape(n_layer=480, n_head=25, n_embd=16000)  # 1.5 trillion weights fit nowhere
    for choice in run_ranks(chosen, 2, huge, "auto"):
        assert choice.name == "fsdp"
        assert "more than is available" in choice.reason
    assert [choice.name for choice in run_ranks(chosen, 2, huge, "ddp")] == ["ddp"] * 2, "asked for is asked for"


@pytest.mark.parametrize(
    ("device", "steps", "settings", "there", "taken", "why"),
    [
        ("cpu", 100_000, {}, True, "eager", "a CPU gains nothing"),
        ("cuda", 100_000, {}, True, "compiled", "100,000 steps on a GPU"),
        ("cuda", 999, {}, True, "eager", "pays off from 1,000 steps"),
        ("cuda", 100_000, {}, False, "eager", "would need triton"),
        ("cuda", 100_000, {"zero_config": {"stage": 1}}, True, "eager", "off by default with DeepSpeed"),
        ("cuda", 9, {"compile": "yes"}, True, "compiled", "asked for"),
        ("cuda", 100_000, {"compile": "no"}, True, "eager", "asked for"),
        ("cpu", 9, {"compile": "yes"}, True, "compiled", "asked for"),
    ],
)
def test_compiled_is_what_a_long_run_on_a_gpu_is_and_what_is_asked_for(
    device: str, steps: int, settings: dict[str, Any], there: bool, taken: str, why: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """With a compiler, triton and Python's headers; `there`: whether triton is."""
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(compiler.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: name if there else None)
    found = build.choose_compile(replace(WORK, steps=steps, **settings), torch.device(device))
    assert found.name == taken
    assert why in found.reason
