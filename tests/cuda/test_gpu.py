"""`make gpu` on a pretended GPU, in small: pytest tests/cuda/test_gpu.py"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu


@pytest.mark.parametrize("only", ["^gpt2, 8", pytest.param("", marks=pytest.mark.long)], ids=["some", "all"])
def test_every_part_is_measured_once(only: str, tmp_path: Path) -> None:
    start = [sys.executable, "-m", "benchmarks.gpu", "--pretended", "--small", "--only", only, "--results", tmp_path]
    for _ in range(2):  # the second time there is nothing left to do
        done = subprocess.run(start, cwd=gpu.ROOT, capture_output=True, text=True, timeout=900)
        lines = [json.loads(line) for line in (tmp_path / "gpu-pretended.jsonl").read_text().splitlines()]
        assert not [line for line in lines if line["result"] == "failed"], lines
        assert done.returncode == 0, done.stderr
        assert [line["part"] for line in lines] == [name for name in gpu.parts() if name.startswith(only.strip("^"))]
    assert {(line["hardware"], line["torch"]) for line in lines} == {("pretended", gpu.version("torch"))}
    memory = next(line for line in lines if line["part"] == "gpt2, 8")
    assert memory["figures"]["forecast / peak"] == pytest.approx(1, abs=0.1)
    assert memory["not_measured"] == ["tokens/s", "s a step"]


def test_a_part_that_fails_or_hangs_is_recorded(tmp_path: Path) -> None:
    run, begun = gpu.Run(tmp_path, False, True), time.monotonic()
    failed = gpu.measured(run, "one", lambda run: run("this_is_no_module"), 30)  # type: ignore[arg-type,return-value]
    assert "No module named this_is_no_module" in failed["error"]
    asleep = ["timeit", "-n1", "-r1", "__import__('time').sleep(60)"]
    hung = gpu.measured(run, "two", lambda run: run(*asleep), 1)  # type: ignore[arg-type,return-value]
    assert (hung["result"], hung["error"]) == ("failed", "TimeoutError: timeit was not through in time")
    assert time.monotonic() - begun < 30
