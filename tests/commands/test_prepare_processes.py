"""wikift prepare as processes: signals, a second process, a terminal, a full disk."""

from __future__ import annotations

import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands.test_prepare import everything
from tests.real import ROOT
from tests.terminal import Terminal

LAUNCH = [sys.executable, str(ROOT / "launch" / "prepare.py")]


@pytest.fixture
def long_text(tmp_path: Path) -> Path:
    """5 MB of text, which keeps two workers busy for a few seconds."""
    numbers = ((i % 97, i * 7919 % 1009, i % 31) for i in range(80_000))
    lines = [f"the {a} of {b} and the others , once or twice or {c} times over\n" for a, b, c in numbers]
    (tmp_path / "long.txt").write_text("".join(lines))
    return tmp_path / "long.txt"


_STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def no_process_outlives_its_test() -> Iterator[None]:
    yield
    while _STARTED:
        process = _STARTED.pop()
        process.kill()
        process.communicate(timeout=30)


# gigatoken would be done before a signal could be sent
_WITHOUT = (
    "import runpy, sys; sys.modules['gigatoken'] = None; del sys.argv[0]; runpy.run_path(sys.argv[0], {}, '__main__')"
)
SLOW_LAUNCH = [sys.executable, "-c", _WITHOUT, *LAUNCH[1:]]


def start(source: Path, out: Path) -> subprocess.Popen[str]:
    words = ["--dataset", str(source), "--tokenizer", "train:300", "--out", str(out), "--workers", "2"]
    _STARTED.append(subprocess.Popen([*SLOW_LAUNCH, *words], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    return _STARTED[-1]


def until_writing(process: subprocess.Popen[str], out: Path) -> None:
    """Wait until the first tokens are on the disk."""
    file = out.parent / f".{out.name}.partial" / "train.bin"
    limit = time.monotonic() + 60
    while not (file.exists() and file.stat().st_size):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_a_stopped_prepare_leaves_nothing(long_text: Path, tmp_path: Path) -> None:
    process = start(long_text, tmp_path / "out")
    until_writing(process, tmp_path / "out")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143
    assert "Traceback" not in err
    assert everything(tmp_path) == ["long.txt"]


def test_of_two_prepares_one_works_and_one_waits(long_text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = start(long_text, out)
    until_writing(first, out)
    second = start(long_text, out)
    printed = [process.communicate(timeout=120) for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0]
    assert printed[0][0] == printed[1][0], "the same table"
    assert "training a byte-level BPE" in printed[0][1]
    assert not {"\r", "\x1b"} & set(printed[0][1]), "plain lines in a pipe"
    assert printed[1][1] == f"waiting for another process that is preparing {out}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long.txt", "out"]


def test_a_terminal_gets_one_line_that_fits_and_is_left_clean(long_text: Path, tmp_path: Path) -> None:
    words = ["--dataset", str(long_text), "--tokenizer", "train:300", "--out", str(tmp_path / "out"), "--workers", "2"]
    terminal = Terminal(["/bin/sh", "-c", f"exec {shlex.join([*SLOW_LAUNCH, *words])} >/dev/null"], columns=40)
    shown = terminal.wait_for("train: ")
    terminal.send("\x03")
    shown += terminal.rest()
    assert terminal.exit_code() == 130
    rates = [part.partition("\x1b[K")[0] for part in shown.split("\r") if part.startswith("train: ")]
    assert all("MB/s" in line and len(line) == 39 for line in rates)
    assert shown.endswith("\r\x1b[Kwikift: interrupted\r\n")
    assert everything(tmp_path) == ["long.txt"]


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def test_a_write_that_fails_is_the_environments_fault(long_text: Path, tmp_path: Path) -> None:
    words = ["--dataset", str(long_text), "--tokenizer", "train:300", "--out", str(tmp_path / "out"), "--workers", "2"]
    out = subprocess.run([*LAUNCH, *words], preexec_fn=limit_file_size, capture_output=True, text=True, timeout=120)
    assert out.returncode == 1
    assert "out: the disk is full (File too large); free disk space" in out.stderr
    assert "Traceback" not in out.stderr
    assert everything(tmp_path) == ["long.txt"]
