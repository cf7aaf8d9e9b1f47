"""--early-stopping-patience: when a run ends by itself, what it keeps, and that a resumed one ends there too."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.ranks import run_ranks
from tests.tiny import arguments, curve, metrics, train
from tests.training.test_resume import assert_same_run
from wikift.base.folders import list_checkpoints, step_folder
from wikift.checkpoint.reader import best_checkpoint
from wikift.settings.schedule import Due

# at this rate the validation loss of the tiny model falls and then rises
WORDS = {"max_steps": 40, "eval_steps": 2, "save_steps": 4, "learning_rate": 0.05, "save_total_limit": 2}


@pytest.fixture(scope="module")
def whole(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run without early stopping."""
    run = tmp_path_factory.mktemp("early") / "whole"
    assert run_ranks(train, 1, arguments(store, run, **WORDS)) == [0]
    return run


def expected_end(run: Path, patience: int) -> int:
    """The step at which `patience` validations in a row of a whole run were no better than the best before them."""
    best, worse = math.inf, 0
    for values in metrics(run):
        if (loss := values.get("eval_loss")) is not None:
            best, worse = (loss, 0) if loss < best else (best, worse + 1)
            if worse == patience:
                return int(values["step"])
    raise AssertionError("the loss never rose for so long: the test would test nothing")


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_run_ends_where_the_losses_say_and_keeps_the_best(
    store: Path, whole: Path, tmp_path: Path, ranks: int, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    line = arguments(store, run, **WORDS, early_stopping_patience=3)
    if ranks == 1:
        line.remove("--quiet")
    assert run_ranks(train, ranks, line) == [0] * ranks
    end = expected_end(run, 3)
    assert end < 38
    if ranks == 1:
        assert curve(run) == [values for values in curve(whole) if values[0] <= end]
        said = capsys.readouterr().out
        assert f"stopped early at step {end}: 3 validations in a row were no better than" in said
        assert f"wikift consolidate {run} --best" in said
    steps = [int(path.name.removeprefix("step-")) for path in list_checkpoints(run)]
    assert steps[-1] == end, "where it stopped is saved, so that a larger patience can go on"
    best = best_checkpoint(run)
    assert best is not None
    losses = {v["step"]: v["eval_loss"] for v in metrics(run) if v.get("eval_loss") is not None}
    found = min(losses, key=lambda step: losses[step])
    assert ranks > 1 or found % WORDS["save_steps"], "a checkpoint is due there in any case"
    assert int(best.name.removeprefix("step-")) == found


def test_the_same_command_is_finished_and_a_larger_patience_goes_on(
    store: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    line = arguments(store, run, **WORDS, early_stopping_patience=2, quiet=False)
    assert train(line) == 0
    before, end = metrics(run), expected_end(whole, 2)
    capsys.readouterr()
    assert train(line) == 0
    assert f"{run} is finished, step {end}; 2 validations were no better" in capsys.readouterr().out
    assert metrics(run) == before
    assert train(arguments(store, run, **WORDS, early_stopping_patience=4)) == 0
    assert curve(run) == [values for values in curve(whole) if values[0] <= expected_end(whole, 4)]


def stopped_at(step: int, command_line: list[str]) -> int:
    """Train, and be asked to stop in the middle of `step`: it is saved without its validation."""
    from wikift.engines.single import SingleEngine

    true_step, done = SingleEngine.step, 0

    def step_and_signal(engine: SingleEngine, lr: float) -> Any:
        nonlocal done
        done += 1
        if done == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return true_step(engine, lr)

    SingleEngine.step = step_and_signal  # type: ignore[method-assign]
    return train(command_line)


@pytest.mark.parametrize("patience", [3, None])
def test_a_validation_that_a_stop_left_out_is_made_up_for(store: Path, tmp_path: Path, patience: int | None) -> None:
    words = {**WORDS, "max_steps": 40 if patience else 12, "save_total_limit": 40, "early_stopping_patience": patience}
    undisturbed = tmp_path / "undisturbed"
    assert train(arguments(store, undisturbed, **words)) == 0
    end = metrics(undisturbed)[-1]["step"]
    for step in (end - 4, end):  # before the end, and where the run would have ended
        run = tmp_path / f"run{step}"
        assert run_ranks(stopped_at, 1, step, arguments(store, run, **words)) == [75]
        manifest = step_folder(run, step) / "manifest.json"
        assert json.loads(manifest.read_text())["eval_loss"] is None
        assert run_ranks(train, 1, arguments(store, run, **words)) == [0]
        assert_same_run(run, undisturbed)
        (expected,) = (values["eval_loss"] for values in metrics(undisturbed) if values["step"] == step)
        assert json.loads(manifest.read_text())["eval_loss"] == expected, "the checkpoint may be the best"


@given(steps=st.integers(1, 60), eval_steps=st.integers(1, 20), save_steps=st.integers(1, 20))
def test_validations_are_counted_as_the_loop_makes_them(steps: int, eval_steps: int, save_steps: int) -> None:
    due = Due(1, eval_steps, save_steps, steps, 0)
    assert [due.validations(n) for n in range(steps + 1)] == [
        sum(map(due.evaluate, range(n + 1, steps + 1))) for n in range(steps + 1)
    ]
