"""Which engine --engine auto takes, on real ranks. Run: pytest tests/engines/test_build.py"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from wikift.base.errors import UserError
from wikift.base.shape import Shape
from wikift.base.work import AdamSettings, Choice, Work
from wikift.engines import build, memory
from wikift.engines.build import choose

WORK = Work(
    engine=Choice("auto", ""), compile="auto", shape=Shape(), block_size=512, micro_batch=32, accumulation=2,
    may_shrink=True, steps=10, precision="fp32", gradient_checkpointing=False, fsdp_reshard=True,
    residual_dtype="fp32", reduce_dtype="fp32", adam=AdamSettings(0.0, 0.9, 0.999, 1e-8, 1.0), zero_config={},
    save_aside=True,
)  # fmt: skip


def chosen(gigabytes: list[float], before: Any, changes: dict[str, Any]) -> tuple[str, int, str]:
    """Engine, micro-batch and reason on a rank that has so much memory, or the problem."""
    from wikift.base.world import start_world

    world = start_world("cpu")
    memory.available_bytes = lambda world: int(gigabytes[world.rank] * 1e9)
    try:
        work = choose(replace(WORK, **changes), memory.machine_of(world), before)
    except UserError as error:
        return "", 0, error.problems[0]
    return work.engine.name, work.micro_batch, work.engine.reason


@pytest.mark.parametrize(
    ("gigabytes", "before", "changes", "engine", "size", "why"),
    [
        ([60.0], None, {}, "single", 2, "one process, about"),
        ([60.0], None, {"block_size": 16}, "single", 64, "one process"),  # not more than 64 blocks, nor 2,048 tokens
        ([4.0], None, {}, "single", 2, "one process, about 3.49 GB of 3.60 GB each, no buffers for checkpoints"),
        ([3.0], None, {}, "", 0, "2.70 GB is available; take --gradient-checkpointing ("),
        ([2.0], None, {"may_shrink": False, "micro_batch": 1}, "single", 1, "it may run out of memory"),
        ([60.0, 60.0], None, {}, "ddp", 2, "2 processes"),
        ([60.0, 4.5], None, {}, "ddp", 1, "2 processes"),  # the smaller one decides, on both
        ([60.0, 4.0], None, {}, "fsdp", 2, "each, DDP needs more, no buffers for checkpoints"),
        ([60.0, 4.0], None, {"engine": Choice("ddp", "asked for")}, "", 0, " GB) or --nproc_per_node=1 ("),
        ([2.0, 2.0], None, {"may_shrink": False}, "fsdp", 32, "it may run out of memory"),
        ([60.0, 60.0], ("fsdp", 1), {}, "fsdp", 1, "2 processes"),  # as before
        ([60.0, 60.0], ("zero2", 1), {}, "ddp", 2, "2 processes"),  # asked for then, not now
        ([60.0, 60.0], None, {"fsdp_reshard": False}, "", 0, "has no effect, --engine auto takes ddp"),
    ],
)  # fmt: skip
def test_engine_and_micro_batch_by_memory(
    gigabytes: list[float], before: Any, changes: dict[str, Any], engine: str, size: int, why: str
) -> None:
    work = {"micro_batch": 64, "accumulation": 1, **changes} if "block_size" in changes else changes
    for found in run_ranks(chosen, len(gigabytes), gigabytes, before, work):
        assert found[:2] == (engine, size), found
        assert why in found[2]


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
    monkeypatch.setattr(build.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: name if there else None)
    found = build.choose_compile(replace(WORK, steps=steps, **settings), torch.device(device))
    assert found.name == taken
    assert why in found.reason
