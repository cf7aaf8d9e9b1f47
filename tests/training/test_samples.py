"""What a run writes on its way, under every engine, without moving the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.matrix import train_all
from tests.ranks import run_ranks
from tests.real import ROOT
from tests.tiny import arguments, curve
from tests.trained import text_store
from tests.training.test_resume import stopped_in
from wikift.data.store import TokenStore

PROMPTS = ("The Renaissance", "Theodor W. Hänsch shared", "東京")
LONG = [pytest.param(engine, 2, marks=pytest.mark.long) for engine in ("zero1", "zero2")]
PLACES = [("single", 1), ("ddp", 2), ("fsdp", 2), ("zero3", 2), *LONG]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return text_store(tmp_path_factory.mktemp("samples") / "store")


def line(engine: str, store: TokenStore, run: Path, **settings: Any) -> list[str]:
    shape = "n_layer=2,n_head=2,n_embd=32,n_positions=32"
    placed = {"deepspeed": ROOT / "ds_configs" / f"{engine}.json"} if engine.startswith("zero") else {"engine": engine}
    words = {"config_overrides": shape, "block_size": 16, "max_steps": 8, "save_steps": 4, **placed, **settings}
    return arguments(store.path, run, **words)


def samples(run: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (run / "samples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(store: TokenStore, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What one process writes; its dropout is another than two processes', so it is off."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    words = line("single", store, folder / "run", dropout=0, sample_prompts=folder / "prompts.txt", sample_steps=3)
    assert run_ranks(train_all, 1, [words]) == [[0]]
    return samples(folder / "run")


@pytest.mark.parametrize(("engine", "ranks"), PLACES)
def test_samples_leave_no_trace_in_the_run(
    store: TokenStore, tmp_path: Path, engine: str, ranks: int, alone: list[dict[str, Any]]
) -> None:
    """With dropout the curves are equal to the last bit; without it every engine writes the same texts."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    asked = {"sample_prompts": tmp_path / "prompts.txt", "sample_steps": 3}
    lines = [
        line(engine, store, tmp_path / "with", **asked),
        line(engine, store, tmp_path / "without"),
        line(engine, store, tmp_path / "texts", dropout=0, **asked),
    ]
    assert run_ranks(train_all, ranks, lines) == [[0, 0, 0]] * ranks
    assert curve(tmp_path / "with") == curve(tmp_path / "without")
    assert not (tmp_path / "without" / "samples.jsonl").exists()
    written = samples(tmp_path / "texts")
    assert [(row["step"], row["prompt"]) for row in written] == [(step, p) for step in (3, 6, 8) for p in PROMPTS]
    assert all(row["text"] for row in written)
    assert written == alone


@pytest.mark.parametrize("step", [3, 8])
def test_a_sample_that_a_stop_omitted_is_made_up_for(store: TokenStore, tmp_path: Path, step: int) -> None:
    """In the midst of a run, and at its last step, where nothing else is left to do."""
    (tmp_path / "prompts.txt").write_text(PROMPTS[0])
    asked = {"sample_prompts": tmp_path / "prompts.txt", "sample_steps": 3, "save_steps": 8, "eval_steps": 8}
    run, whole = (line("single", store, tmp_path / name, **asked) for name in ("run", "whole"))
    assert run_ranks(stopped_in, 1, step, "single", run) == [75]
    assert run_ranks(train_all, 1, [run, whole]) == [[0, 0]]
    assert samples(tmp_path / "run") == samples(tmp_path / "whole")
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
