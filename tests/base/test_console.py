"""How far a long task has come, as one line.

pytest tests/base/test_console.py
"""

from __future__ import annotations

import pytest

from wikift.base import console


def test_a_fraction_and_the_time_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = 100.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    progress, quiet = console.Progress(quiet=False), console.Progress(quiet=True)
    for seconds, done in ((0, 0.0), (12, 0.0), (15, 0.1), (30, 0.1), (50, 0.5), (70, 1.2)):
        now = 100.0 + seconds
        progress.fraction("a.txt", done)
        quiet.fraction("a.txt", done)
    progress.clear()  # nothing to remove where the lines stay
    lines = ["a.txt: reading", "a.txt: 10%, 4 min left", "a.txt: 50%, 50 s left", "a.txt: 100%, 0 s left"]
    assert capsys.readouterr().err.splitlines() == lines
