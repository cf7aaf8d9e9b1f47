"""metrics.jsonl: what is written, and what a resumed run keeps of it.

pytest tests/watch/test_metrics.py
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import metrics
from wikift.base.errors import EnvironmentFault
from wikift.watch.metrics import keep_until, open_log
from wikift.watch.record import read_metrics


def a_log(run: Path, **words: Any) -> Any:
    return open_log(run, **{"after_step": 0, "steps": 9, "epochs": 3.0, "quiet": True, **words})


def test_every_line_is_strict_json_and_what_is_not_finite_is_null(tmp_path: Path) -> None:
    with a_log(tmp_path) as log:
        log.record({"step": 1, "loss": math.nan, "grad_norm": math.inf, "eval_loss": -math.inf, "lr": 1e-5})
        written = (tmp_path / "metrics.jsonl").read_text()  # at once, not when the log is closed
        log.record({"step": 2, "loss": 3.0000000000000004})
    expected = {"step": 1, "loss": None, "grad_norm": None, "eval_loss": None, "lr": 1e-5}
    assert json.loads(written, parse_constant=pytest.fail) == expected
    assert metrics(tmp_path) == [expected, {"step": 2, "loss": 3.0000000000000004}]


@pytest.mark.parametrize(
    "torn", ["", '{"step": 5, "lo', '{"step": 5, "loss": 1.0}', "\x00\x00\x00", '{"step": null}\n', "7\n"]
)
def test_a_resumed_run_has_no_step_twice_and_no_torn_line(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "loss": 1 / step} for step in range(1, 6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:4]) + torn)
    for _ in range(2):
        keep_until(path, 3)
        assert metrics(tmp_path) == rows[:3]
    assert [item.name for item in tmp_path.iterdir()] == ["metrics.jsonl"]
    with a_log(tmp_path, after_step=2) as log:
        log.record(rows[2])
    assert metrics(tmp_path) == read_metrics(path) == rows[:3]


def test_a_complete_last_line_without_its_end_and_any_text_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    keep_until(path, 2)
    with a_log(tmp_path, after_step=2) as log:
        log.record({"step": 3})
        log.samples(3, ["東京"], ["a\u2028b\x85c"])  # line ends of Unicode's, not of JSON lines
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3]
    keep_until(tmp_path / "samples.jsonl", 3)
    assert read_metrics(tmp_path / "samples.jsonl") == [{"step": 3, "prompt": "東京", "text": "a\u2028b\x85c"}]
    keep_until(tmp_path / "none", 2)
    assert read_metrics(tmp_path / "none") == []


def test_a_file_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    (tmp_path / "full").mkdir()
    with pytest.raises(EnvironmentFault, match=r"metrics\.jsonl cannot be written .* run the same"), a_log(tmp_path):
        pass
    full_disk = r"No space left.*free disk space .* run the same command"
    with pytest.raises(EnvironmentFault, match=full_disk), a_log(tmp_path / "full") as log:  # noqa: PT012
        os.dup2(os.open("/dev/full", os.O_WRONLY), log.file.fileno())
        log.record({"step": 1})  # and once more when the file is closed
