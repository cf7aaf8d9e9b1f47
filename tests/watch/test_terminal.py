"""A run in a terminal: the live panel, and plain lines elsewhere.

pytest tests/watch/test_terminal.py
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, ConsoleDimensions

import wikift.watch.terminal
from tests.watch.test_metrics import a_log
from wikift.watch.terminal import Terminal, duration, line, phase

FULL: dict[str, Any] = {
    "step": 1_234_567, "loss": 3.21, "grad_norm": 0.987, "learning_rate": 4.8e-5, "tokens": 10**10,
    "tokens_per_second": 1_234_567.0, "memory_gb": 39.99, "seconds_left": 100_000.0, "mfu": 0.41, "skipped_steps": 3,
    "eval_loss": 3.1, "eval_perplexity": 22.19, "eval_word_perplexity": 37.5, "now": "validating 1,234/5,678",
    "saved_step": 1_234_500, "save_seconds": 34.5, "save_stall_seconds": 0.25, "data_wait": 0.01,
    "ranks": {"memory_gb": [39.99, 41.5], "data_wait": [0.01, 0.0], "matmul_ms": [0.0, 0.0]},
}  # fmt: skip
SHOWN = (
    "loss 3.2100", "ppl 24.78", "eval loss 3.1000", "eval ppl 22.19", "grad norm 0.987", "lr 4.80e-05",
    "tokens/s 1,234,567", "mfu 41.0%", "memory 41.50 GB, rank 1", "skipped 3", "time left 27:46:40",
)  # fmt: skip
CELLS = (
    "loss 3.2100", "ppl 24.78", "eval loss 3.1000", "eval ppl 22.19", "best eval 3.1000", "best step 1,234,567",
    "grad norm 0.987", "lr 4.80e-05", "tokens/s 1,234,567", "data wait 1.0%, rank 0", "memory 41.50 GB, rank 1",
    "saved step 1,234,500", "stall 0.25 s", "skipped 3", "mfu 41.0%", "validating 1,234/5,678", "no warnings",
)  # fmt: skip


def frame(width: int, values: dict[str, Any], earlier: int = 0) -> list[str]:
    """The panel's lines in a terminal of `width` columns, after `earlier` lines of a run of 2,000,000 steps."""
    with open(os.devnull, "w") as nowhere:
        console = Console(width=width + 3, record=True, file=nowhere, force_terminal=True)
        lines = [{"step": step, "loss": 11 - step / 100} for step in range(1, earlier + 1)]
        shown = Terminal(2_000_000, console, 3.0, lines)
        shown._learn(values)
        console.print(shown.panel())
    return [text.rstrip() for text in console.export_text().splitlines()]


@pytest.mark.parametrize(("width", "height"), [(40, 23), (57, 15), (77, 15), (120, 11)])
def test_the_panel_has_every_cell_where_it_was(width: int, height: int) -> None:
    """From the first frame on, in a closed frame; 57 is that of a terminal of 60 x 20."""
    empty, full = frame(width, {}), frame(width, FULL, 900)
    for lines in (empty, full, frame(width, {"step": 3, "loss": 800.0, "seconds_left": 3.4}, 3)):
        assert ({len(text) for text in lines}, len(lines)) == ({width}, height)
        assert lines[-1] == "╰" + "─" * (width - 2) + "╯"
    assert full[0].startswith("╭─ step 1,234,567 of 2,000,000, 61.7"[: width - 2])
    bar = full[1].strip("│ ")  # a line of its own
    assert (set(bar), len(bar)) == ({"━", "╺"}, width - 4) or set(bar) == {"━", "╸"}
    assert re.search(r"10\.\d{4} █+▇+▆+▅+▄+▃+▂+▁+ 2\.\d{4}", full[3])
    if width > 40:
        assert re.search(r"elapsed 0:00 +left 27:46:40 +ends \w{3} \d\d:\d\d +│", full[2])
    text = " ".join(" ".join(full).split())
    assert [cell for cell in CELLS if cell not in text] == []
    labels = re.compile("loss |ppl |lr |tokens/s|memory |saved |stall |mfu |grad norm")
    columns = [[(m[0], m.start()) for m in labels.finditer(line)] for line in empty[4:]]
    assert columns == [[(m[0], m.start()) for m in labels.finditer(line)] for line in full[4:]]


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
            if log.terminal is not None:
                log.terminal.warn("look")
            log.record(FULL)
        assert ("\x1b[" in written[0], bool(written[0])) == (not quiet, not quiet)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written[0]).replace("\r", "\n").splitlines()
    assert max(map(len, lines)) <= columns
    kept = ["a remark [with brackets]", "warning: look", "step 1,234,567: eval loss 3.1000, eval ppl",
            "step 1,234,500: saved in 34.5 s"]  # fmt: skip
    above = [next(i for i, text in enumerate(lines) if text.startswith(part)) for part in kept]
    assert above == sorted(above), "in the scrollback, as they came"
    assert not [text for text in lines if re.match(r"step [\d,]+/", text)]  # no plain lines beside it
    end = " ".join(lines[max(i for i, text in enumerate(lines) if text.startswith("╭─ step 1,234,567 of")) :]).split()
    assert all(part in " ".join(end) for part in CELLS if "warnings" not in part)


def test_a_narrower_terminal_is_painted_over() -> None:
    """It has wrapped the last frame into more lines, and all of them are erased."""
    with open(os.devnull, "w") as nowhere:
        console = Console(width=103, height=50, file=nowhere, force_terminal=True)
        shown = Terminal(9, console)
        assert shown.live is not None
        shown.live.refresh()
        rows = shown.live._live_render.last_render_height
        console.size = ConsoleDimensions(60, 50)
        shown.panel()
        assert shown.live._live_render.last_render_height == 2 * rows  # 100 columns in lines of 60


def test_numbers_are_wanted_by_a_live_view_whose_are_old() -> None:
    shown = Terminal(9, Console(force_terminal=True, file=io.StringIO()))
    for passed, wanted in ((0.0, False), (0.6, True)):
        shown._learn({"step": 1, "loss": 1.0})
        shown.measured -= passed
        assert shown.impatient() is wanted
    assert not Terminal(9, Console(file=io.StringIO())).impatient()


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
