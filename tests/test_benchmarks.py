"""What benchmarks/harness.py makes of measured rounds: pytest tests/test_benchmarks.py"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import harness


def test_contestants_take_turns_and_are_compared_round_by_round(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns: list[str] = []

    def contestant(name: str, rates: list[float]) -> harness.Contestant:
        return lambda: turns.append(name) or {"tokens/s": rates.pop(0)}  # type: ignore[func-returns-value]

    contestants = {"Trainer": contestant("Trainer", [9, 100, 50]), "wikift": contestant("wikift", [9, 190, 105])}
    figures = harness.interleave(contestants, 2, uncounted=1)
    assert turns == ["wikift", "Trainer", "Trainer", "wikift", "wikift", "Trainer"]
    lines = harness.table(figures, "Trainer", "tokens/s")
    assert lines[-1] == "| wikift | 147.5 | 2 (1.9 to 2.1) |"
    given = harness.options("", "train", rounds=2).parse_args(["--results", str(tmp_path)])
    harness.write(given, "Training steps", figures, lines, about=harness.machine(), block=8)
    stored = json.loads((tmp_path / "train.json").read_text())
    assert stored["rounds"]["wikift"] == {"tokens/s": [190, 105]}
    assert stored["settings"] == {"block": 8}
    assert {"cpu", "cores", "torch"} <= stored["machine"].keys()
    assert (tmp_path / "train.md").read_text() == capsys.readouterr().out[:-1]


def test_a_command_that_fails_shows_its_own_error() -> None:
    with pytest.raises(RuntimeError, match="No module named this_is_none"):
        harness.timed([sys.executable, "-m", "this_is_none"])
    seconds, megabytes = harness.timed(["true"])
    assert 0 < seconds < 30
    assert megabytes < 100
