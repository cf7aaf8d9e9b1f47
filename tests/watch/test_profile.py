"""--profile: a trace that Perfetto opens, and where the time goes.

pytest tests/watch/test_profile.py
"""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.tiny import arguments, curve, tiny_store, train
from wikift.base.errors import UserError


def test_a_trace_a_table_and_the_same_losses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, settings = tiny_store(tmp_path / "store"), {"max_steps": 6, "quiet": False, "engine": "ddp"}
    run_ranks(train, 2, arguments(store, tmp_path / "plain", **settings))
    capsys.readouterr()
    run_ranks(train, 2, arguments(store, tmp_path / "run", **settings, profile=3))
    shown = capsys.readouterr().out
    assert curve(tmp_path / "run") == curve(tmp_path / "plain")
    parts = dict(re.findall(r"^  (\S+) +([\d.]+)% +[\d.]+ ms a step$", shown, re.MULTILINE))
    names = {"matmul", "attention", "element-wise", "communication", "optimizer", "data", "host"}
    assert set(parts) == names
    assert sum(map(float, parts.values())) == pytest.approx(100, abs=0.5)
    assert min(float(parts[name]) for name in names - {"data"}) > 0
    assert "3 steps of " in shown
    assert re.search(r"^ +[\d.]+%  aten::", shown, re.MULTILINE)
    (trace,) = (tmp_path / "run" / "profile").iterdir()
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert sum(event["name"] == "wikift: waiting for data" for event in events) == 3


def test_more_steps_than_the_run_has(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--profile 5: .* 6 steps, and the first 2 are not profiled; take 4 or fewer"):
        train(arguments(tiny_store(tmp_path / "store"), tmp_path / "run", max_steps=6, profile=5))
