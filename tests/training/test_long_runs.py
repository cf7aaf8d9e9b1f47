"""A run of thousands of steps takes no more memory, files, threads or shared memory at its end than at its beginning.

pytest -m long tests/training/test_long_runs.py -s
LONG_STEPS=20000 pytest -m long tests/training/test_long_runs.py -s
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny import arguments, metrics
from tests.trained import text_store

ROOT = Path(__file__).resolve().parents[2]
STEPS = int(os.environ.get("LONG_STEPS", "2000"))


def held(pid: int) -> dict[str, float]:
    """What a process holds: megabytes, and numbers."""
    resident = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    if resident is None:
        raise FileNotFoundError  # it has ended
    files, threads = (len(os.listdir(f"/proc/{pid}/{name}")) for name in ("fd", "task"))
    return {"MB": int(resident[1]) / 1024, "files": files, "threads": threads, "shm": len(os.listdir("/dev/shm"))}


@pytest.mark.long
def test_nothing_grows(tmp_path: Path) -> None:
    """With validations, saves, pruning, samples, TensorBoard and log lines all the time."""
    run, prompts = tmp_path / "run", tmp_path / "prompts.txt"
    prompts.write_text("The Renaissance\n")
    words = {"config_overrides": "n_layer=1,n_head=2,n_embd=16,n_positions=16", "max_steps": STEPS, "save_steps": 20,
             "eval_steps": 10, "sample_steps": 50, "sample_prompts": prompts, "report_to": "tensorboard"}  # fmt: skip
    line = [sys.executable, ROOT / "launch" / "train.py", *arguments(text_store(tmp_path / "store").path, run, **words)]
    process = subprocess.Popen(line, env=os.environ | {"OMP_NUM_THREADS": "1"})
    seen = dict[int, list[dict[str, float]]]()  # in each tenth of the run
    try:
        while process.poll() is None:
            time.sleep(0.1)
            with contextlib.suppress(FileNotFoundError):  # it has not begun, or has ended meanwhile
                tenth = 10 * (run / "metrics.jsonl").read_bytes().count(b"\n") // STEPS
                seen.setdefault(tenth, []).append(held(process.pid))
    finally:
        process.kill()
    assert process.wait() == 0
    most = [{name: max(one[name] for one in seen[tenth]) for name in seen[tenth][0]} for tenth in range(10)]
    for tenth, one in enumerate(most):
        print(f"{tenth + 1}/10 of {STEPS} steps: {one}")
    for name, bound in {"MB": 8, "files": 1, "threads": 1, "shm": 0}.items():  # a save may be under way
        assert most[9][name] <= max(one[name] for one in most[1:3]) + bound, name
    assert [row["step"] for row in metrics(run) if "event" not in row] == list(range(1, STEPS + 1))
    assert len(list((run / "checkpoints").iterdir())) <= 3
