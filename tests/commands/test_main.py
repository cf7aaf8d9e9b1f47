"""The commands as a user types them: torchrun, signals to real processes, a rank that fails, a terminal."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny import arguments, logged, metrics, tiny_store, until
from wikift.base.folders import list_checkpoints

ROOT = Path(__file__).resolve().parents[2]
TRAIN = str(ROOT / "launch" / "train.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
SECONDS = 120


def start(command: list[str], **environment: str) -> subprocess.Popen[str]:
    words = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        command, env=words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def endless(tmp_path: Path) -> list[str]:
    words = {"max_steps": 10**6, "save_steps": 10**6, "eval_steps": 10**6, "quiet": False}
    return arguments(tiny_store(tmp_path / "store"), tmp_path / "run", **words)


def test_torchrun_sigterm_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    line, run = endless(tmp_path), tmp_path / "run"
    process = start([*TORCHRUN, "--nproc_per_node=2", TRAIN, *line])
    until(lambda: logged(run) >= 5, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=SECONDS)
    assert output.count("wikift: SIGTERM: stops after this micro-batch") == 1, "one rank says it"
    assert "stopped by SIGTERM and saved" in output
    (saved,) = list_checkpoints(run)
    step = int(saved.name.removeprefix("step-"))
    process = start([*TORCHRUN, "--nproc_per_node=2", TRAIN, *line])
    until(lambda: logged(run) >= step + 5, process)
    os.killpg(process.pid, signal.SIGKILL)  # the launcher only: its ranks are in sessions of their own
    process.communicate(timeout=SECONDS)
    until(lambda: len(list_checkpoints(run)) == 2, seconds=20)  # orphaned ranks notice, save and leave
    steps = [values["step"] for values in metrics(run)]
    assert steps == list(range(1, len(steps) + 1)), "a step is there twice, or missing"


LONG_STEP = """
import hashlib, sys
sys.path.insert(0, {root!r})
from wikift.commands.main import main, run
from wikift.engines.single import SingleEngine

def forward_backward(self, blocks, *, last):
    print("computing", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # Python's handlers wait for its end, as for a backward pass

SingleEngine.forward_backward = forward_backward
run(main, ["train", *sys.argv[1:]])
"""


def test_a_signal_is_answered_at_once_and_a_second_one_ends_at_once(tmp_path: Path) -> None:
    line = arguments(tiny_store(tmp_path / "store"), tmp_path / "run")
    process = start([sys.executable, "-c", LONG_STEP.format(root=str(ROOT)), *line])
    assert process.stdout is not None
    while "computing" not in (text := process.stdout.readline()):
        assert text, "it has ended"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == (
        "wikift: SIGINT: stops after this micro-batch and saves; again: stops at once\n"
    )
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=5)
    assert process.returncode == 128 + signal.SIGINT
    assert "stopped at once" in output
    assert list_checkpoints(tmp_path / "run") == []


def test_a_stop_cuts_a_long_validation_short_and_saves(tmp_path: Path) -> None:
    store = tiny_store(tmp_path / "store", validation=2_000_000)
    line = arguments(store, tmp_path / "run", max_steps=5, eval_steps=1, save_steps=5, quiet=False)
    process = start([*TORCHRUN, "--nproc_per_node=2", TRAIN, *line])
    until((tmp_path / "run" / "metrics.jsonl").exists, process)
    time.sleep(2.0)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=25)
    assert "the validation is interrupted" in output
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-00000001"]


FAILING = """
import os, signal, sys
sys.path.insert(0, {root!r})
from wikift.commands.main import run
from wikift.base.errors import UserError

def main(argv):
    from wikift.base.failure import started_world
    with started_world("cpu", 8) as world:
        world.barrier()
        if world.rank == 1 and argv == ["sleep"]:
            import time; time.sleep(60)
        if world.rank == 1 and argv == ["stop"]:
            os.kill(os.getpid(), signal.SIGSTOP)
        if world.rank == 1 and argv == ["raise"]:
            raise ValueError("the cause of it all")
        if world.rank == 1 and argv == ["kill"]:
            os.kill(os.getpid(), signal.SIGKILL)
        if argv == ["user"]:
            raise UserError("--block-size 0: must be 1 or more")
        world.barrier()
        import time; time.sleep(60)
    return 0

run(main)
"""


@pytest.mark.parametrize(
    ("how", "first_word"),
    [
        ("raise", "wikift: rank 1 failed:"),
        ("kill", None),
        ("sleep", None),
        pytest.param("stop", None, marks=pytest.mark.long),  # torchrun waits 30 s for it to obey SIGTERM
        ("user", "wikift: one problem"),
    ],
)
def test_a_rank_that_fails_ends_all_within_seconds(tmp_path: Path, how: str, first_word: str | None) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(root=str(ROOT)))
    begun = time.monotonic()
    process = start([*TORCHRUN, "--nproc_per_node=3", str(script), how])
    limit = 85 if how == "stop" else 50  # the script sleeps for 60 s where nobody ends it
    output, _ = process.communicate(timeout=limit)
    assert time.monotonic() - begun < limit
    assert process.returncode != 0
    if first_word is not None:
        assert output.startswith(first_word), output
    if how == "kill":  # though torchrun has seen it die too and sends SIGTERM at once
        assert " lost the connection to rank 1" in output
    if how in ("sleep", "stop"):
        assert re.search(
            r"wikift: rank [02] waited 8 s for rank 1, since \d\d:\d\d:\d\d in total \(world.py:\d+\)", output
        )
    if how == "raise":
        assert output.index("the cause of it all") < output.index("stops, rank 1 failed")
    if how == "user":
        assert output.count("--block-size 0") == 1, "only one rank speaks"
