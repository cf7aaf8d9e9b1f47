"""A run in a terminal: the live panel, and plain lines elsewhere.

pytest tests/watch/test_terminal.py
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import wikift.watch.terminal
from tests.watch.test_metrics import a_log
from wikift.watch.terminal import duration, line, panel, phase

FULL: dict[str, Any] = {
    "step": 1_234_567, "loss": 3.21, "grad_norm": 0.987, "learning_rate": 4.8e-5, "tokens": 10**10,
    "tokens_per_second": 1_234_567.0, "memory_gb": 39.99, "seconds_left": 100_000.0, "mfu": 0.41, "skipped_steps": 3,
    "eval_loss": 3.1, "eval_perplexity": 22.19, "eval_word_perplexity": 37.5, "now": "validating 1,234/5,678",
    "saved": "step-01234500",
}  # fmt: skip
SHOWN = (
    "loss 3.2100", "ppl 24.78", "eval loss 3.1000", "eval ppl 22.19", "norm 0.987", "lr 4.80e-05", "tok/s 1,234,567",
    "mfu 41.0%", "memory 39.99 GB", "skipped 3", "now validating 1,234/5,678", "saved step-01234500",
    "time left 27:46:40",
)  # fmt: skip


def printed(width: int, values: dict[str, Any], steps: int) -> list[str]:
    """The panel's lines in a terminal of `width` columns."""
    with open(os.devnull, "w") as nowhere:
        console = Console(width=width, record=True, file=nowhere)
        console.print(panel(values, steps))
    return console.export_text().splitlines()


@pytest.mark.parametrize("width", [40, 60, 80, 200])
@pytest.mark.parametrize(
    ("values", "shown"),
    [({}, ()), ({"step": 0}, ()), (FULL, SHOWN),
     ({"step": 3, "loss": 800.0, "seconds_left": 3.4}, ("loss 800.0000", "ppl inf", "time left 0:03"))],
)  # fmt: skip
def test_the_panel_fits_and_shows_everything(width: int, values: dict[str, Any], shown: tuple[str, ...]) -> None:
    lines = printed(width, values, 2_000_000)
    assert {len(text) for text in lines} == {width}  # a closed frame, nothing sticks out
    assert lines[0].startswith(f"╭─ step {values.get('step', 0):,} of 2,000,000 ─")
    assert lines[-1] == "╰" + "─" * (width - 2) + "╯"
    bar, *rest = [text.strip("│ ") for text in lines[1:-1]]
    assert set(bar) <= {"━", "╸", "╺"}  # a line of its own
    inside = " | ".join(rest)
    assert all(part in inside for part in shown)
    assert bool(inside.strip(" |")) == bool(shown)


def test_the_bar_is_as_long_as_the_run_is_done() -> None:
    assert [sum(text.count("━") for text in printed(104, {"step": n}, 100)) for n in (0, 50, 100)] == [0, 50, 100]


def test_a_plain_line() -> None:
    text = line(FULL, 2_000_000)
    assert text.startswith("step 1,234,567/2,000,000  loss 3.2100  ppl 24.78  ")
    assert all(part in text for part in SHOWN)
    assert line({"step": 1, "loss": math.nan}, 2) == "step 1/2  loss nan  ppl nan"
    assert [duration(s) for s in (0.4, 59.6, 61, 3725, 360000)] == ["0:00", "1:00", "1:01", "1:02:05", "100:00:00"]


@contextlib.contextmanager
def terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A real pseudo-terminal in place of standard output; at the end the list has what was written, raw."""
    ours, theirs = os.openpty()
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in {"TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": "24"}.items():
        monkeypatch.setenv(name, value)
    written: list[str] = []
    with os.fdopen(theirs, "w", encoding="utf-8") as stream, open(ours, "rb", buffering=0) as reader:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            yield written
        stream.flush()
        os.set_blocking(ours, False)
        raw = b""
        while piece := reader.read(1 << 16):
            raw += piece
    written.append(raw.decode())


@pytest.mark.parametrize("columns", [60, 200])
def test_a_terminal_gets_one_live_panel_or_nothing(columns: int, tmp_path: Path, monkeypatch: Any) -> None:
    for quiet in (True, False):
        with terminal(columns, monkeypatch) as written, a_log(tmp_path, steps=2_000_000, quiet=quiet) as log:
            log.say("a remark [with brackets]")
            log.tick(step=1)
            log.record(FULL)
        assert ("\x1b[" in written[0], bool(written[0])) == (not quiet, not quiet)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written[0]).replace("\r", "\n").splitlines()
    assert max(map(len, lines)) <= columns
    assert "a remark [with brackets]" in lines  # as it is, and above the panel
    assert not [text for text in lines if text.startswith("step ")]  # no plain lines beside it
    end = "\n".join(lines[max(i for i, text in enumerate(lines) if text.startswith("╭─ step 1,234,567 of")) :])
    assert all(part in end for part in SHOWN)


def test_a_pipe_gets_plain_lines_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with a_log(tmp_path, quiet=False) as log:
        log.say("a remark")
        log.record({"step": 1, "loss": 1.0})
        log.tick(now="saving")
    assert capsys.readouterr() == ("a remark\nstep 1/9  loss 1.0000  ppl 2.72\n", "")


def test_what_takes_long_is_named_with_its_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a pipe, by a thread of its own: the step may be one operation of a minute."""
    monkeypatch.setattr(wikift.watch.terminal, "_LONG", 0.3)
    monkeypatch.setattr(wikift.watch.terminal, "_EVERY", 1.0)
    with phase("loading gpt2", print):
        time.sleep(0.4)
    with phase("building the engine", print):
        pass
    started = time.monotonic()
    with a_log(tmp_path, quiet=False) as log:
        for number in (1, 2):
            log.tick(now=f"first step: micro-batch {number}/2")
            time.sleep(1.2)
        log.record({"step": 1, "loss": 1.0})
    printed = capsys.readouterr().out.splitlines()
    seconds = [int(match[1]) for line in printed if (match := re.search(r"micro-batch ./2, (\d+) s$", line))]
    assert seconds == sorted(seconds)
    assert 1 <= seconds[-1] <= time.monotonic() - started + 1
    lines = [re.sub(r"\d s$", "N s", line) for line in printed]
    assert lines[:3] == ["loading gpt2 ...", "loading gpt2 took N s", "building the engine ..."]
    assert [*dict.fromkeys(lines[3:-1])] == [f"  first step: micro-batch {number}/2, N s" for number in (1, 2)]
