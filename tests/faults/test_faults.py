"""A sample of `make soak`: faults at drawn points of every case, signals at random moments; the seed is printed.

pytest tests/faults
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

COMPILER = os.environ.get("CC", "cc")
needs_compiler = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no C compiler ({COMPILER}): set CC")

KNOWN = {  # points at which something was lost or badly told once
    "prepare": ("full 0 create .out.partial/tokenizer/tokenizer.json 1",),
    "resume, save, prune: ddp": (
        "broken 0 unlink run/.run.lock 1",
        "kill 0 rmdir run/stacks 1",
        "unreadable 0 read run/metrics.jsonl 1",
    ),
}


@needs_compiler
@pytest.mark.long
@pytest.mark.parametrize("case", KNOWN)
def test_known_points(case: str) -> None:
    words = ["-m", "tests.faults.points", case, *(word for point in KNOWN[case] for word in ("--point", point))]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_compiler
def test_nothing_is_lost_or_left_by_a_fault(tmp_path: Path) -> None:
    page = tmp_path / "reliability.md"
    words = ["-m", "tests.faults.soak", "--seconds", "25", "--seed", "3", "--page", str(page)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert page.read_text().count("| 0 |\n") == 19, "rows without a problem"
