"""torchrun --max-restarts: what died, hung or was lost comes back by itself, unless it dies where it died before.

pytest tests/training/test_restarts.py
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.tiny import arguments, curve, metrics, tiny_store, train, until
from wikift.base.errors import UserError
from wikift.base.folders import list_checkpoints
from wikift.base.world import World
from wikift.training.resume import count_deaths

ROOT = Path(__file__).resolve().parents[2]
TRAIN = str(ROOT / "launch" / "train.py")
ALONE = ("--standalone", "--nproc-per-node=2", "--max-restarts=9")
SECONDS = 180
Launch = Callable[..., "subprocess.Popen[bytes]"]

DIES_IN_STEP_3 = """
import os, signal, sys, torch
from wikift.base.world import seed
from wikift.commands import main, train
from wikift.model.gpt2 import NextTokenLoss
forward = NextTokenLoss.forward
def dies(self, *inputs):
    if torch.initial_seed() == seed(42, "dropout", 3, 1):
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(self, *inputs)
NextTokenLoss.forward = dies
main.run(train.main)
"""


@pytest.fixture
def torchrun(tmp_path: Path) -> Iterator[Launch]:
    """Starts torchrun with options; all that it prints is in the file `log`."""
    started = []

    def start(*options: str, **environment: str) -> subprocess.Popen[bytes]:
        names = {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "2", "PYTHONPATH": str(ROOT), **environment}
        with open(tmp_path / "log", "ab") as log:
            line = [sys.executable, "-m", "torch.distributed.run", *options]
            started.append(subprocess.Popen(line, env=os.environ | names, stdout=log, stderr=log, cwd=tmp_path))
        return started[-1]

    yield start
    for process in started:
        for pid in [*ranks(process).values(), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def ranks(launcher: subprocess.Popen[bytes]) -> dict[str, int]:
    """The process of each rank that runs below a launcher."""
    pids = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"\nPPid:\t{launcher.pid}\n" in (folder / "status").read_text():
                names = dict(entry.partition("=")[::2] for entry in (folder / "environ").read_text().split("\0"))
                pids |= {names["RANK"]: int(folder.name)} if "RANK" in names else {}
    return pids


def done(run: Path) -> int:
    return max((row["step"] for row in metrics(run)), default=0) if (run / "metrics.jsonl").exists() else 0


def listens(port: int) -> bool:
    with socket.socket() as trial:
        return trial.connect_ex(("localhost", port)) == 0


@pytest.mark.long
def test_a_killed_rank_and_a_hung_one_are_restarted(torchrun: Launch, tmp_path: Path) -> None:
    """To the last bit the run that nobody disturbed; each restart is an event of it, and the stacks are kept."""
    store, run, log = tiny_store(tmp_path / "store"), tmp_path / "run", tmp_path / "log"
    words = {"max_steps": 300, "save_steps": 20, "eval_steps": 100}
    launcher = torchrun(*ALONE, TRAIN, *arguments(store, run, hang_timeout=4, **words))
    for number, strike in enumerate((signal.SIGKILL, signal.SIGSTOP)):
        until(lambda: restarts(run) == number and done(run) >= 30 + 60 * number, launcher, shown=log.read_text)  # noqa: B023
        os.kill(ranks(launcher)["1"], strike)
    assert launcher.wait(SECONDS) == 0, log.read_text()
    assert restarts(run) == 2
    assert "rank 1 shows no sign of life" in log.read_text()
    assert "(most recent call first)" in (run / "stacks" / "rank-0.before.txt").read_text()
    assert run_ranks(train, 2, arguments(store, tmp_path / "whole", **words)) == [0, 0]
    assert curve(run) == curve(tmp_path / "whole")


def restarts(run: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return len([row for row in metrics(run) if row.get("event") == "restart"])
    return 0


def test_three_deaths_at_a_step_end_torchrun(torchrun: Launch, tmp_path: Path) -> None:
    """Without its six other restarts."""
    (tmp_path / "dies.py").write_text(DIES_IN_STEP_3)
    launcher = torchrun(*ALONE, "dies.py", *arguments(tiny_store(tmp_path / "store"), tmp_path / "run"))
    assert launcher.wait(SECONDS) == 1
    printed = (tmp_path / "log").read_text()
    assert printed.count("--max-restarts 9: the run died 3 times in a row after step 2, ") == 1, printed
    assert printed.count("(exitcode: -9)") == 3, printed  # and not of what the start before left in torchrun's store
    assert restarts(tmp_path / "run") == 3


def test_the_same_command_typed_again_counts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    died = {"step": 0, "event": "restart", "after": 2}
    lines = [{"step": 2}, died, died]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_MAX_RESTARTS": "9"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    count_deaths(tmp_path, World(), 0)
    assert metrics(tmp_path)[-1]["after"] == 2
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    count_deaths(tmp_path, World(), 0)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "3")
    with pytest.raises(UserError, match="died 3 times in a row after step 2,"):
        count_deaths(tmp_path, World(), 0)


def test_a_wrong_setting_is_not_tried_again(torchrun: Launch, tmp_path: Path) -> None:
    line = arguments(tiny_store(tmp_path / "store"), tmp_path / "run", seed=-1, resume="never")
    assert torchrun(*ALONE, TRAIN, *line).wait(SECONDS) == 1
    printed = (tmp_path / "log").read_text()
    assert printed.count("--seed -1: ") == 1, printed
    assert printed.count("--resume never: would go back at each restart") == 1


@pytest.mark.long
def test_agents_come_and_go(torchrun: Launch, tmp_path: Path) -> None:
    """Four ranks, two, three: the losses of one process, within 1e-5, dropout off."""
    store, run, log = tiny_store(tmp_path / "store"), tmp_path / "run", tmp_path / "log"
    words = {"max_steps": 600, "save_steps": 20, "eval_steps": 200, "dropout": 0, "global_batch_size": 12}
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    meeting = ["--rdzv-backend=c10d", "--rdzv-id=run", f"--rdzv-endpoint=localhost:{port}"]
    quick = "--rdzv-conf=last_call_timeout=4,keep_alive_interval=1"

    def agent() -> subprocess.Popen[bytes]:
        line = [*meeting, quick, "--nnodes=2:4", "--nproc-per-node=1", "--max-restarts=9", TRAIN]
        return torchrun(*line, *arguments(store, run, learning_rate=1e-3, quiet=False, **words),
                        TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")  # fmt: skip

    first = agent()  # alone it has the store where all meet
    until(lambda: listens(port), first, shown=log.read_text)
    others = [agent() for _ in range(3)]
    until(lambda: done(run) >= 60, first, shown=log.read_text)
    assert "12 blocks per step = 4 processes" in log.read_text()
    for lost in others[:2]:
        for pid in (lost.pid, *ranks(lost).values()):
            os.kill(pid, signal.SIGKILL)
    until(lambda: restarts(run) and done(run) >= 200, first, shown=log.read_text)
    assert "12 blocks per step = 2 processes" in log.read_text()
    third = agent()
    assert [each.wait(SECONDS) for each in (first, others[2], third)] == [0, 0, 0], log.read_text()
    assert "12 blocks per step = 3 processes" in log.read_text()
    assert list_checkpoints(run)
    assert run_ranks(train, 1, arguments(store, tmp_path / "whole", learning_rate=1e-3, **words)) == [0]
    for ours, expected in zip(curve(run), curve(tmp_path / "whole"), strict=True):
        assert ours[1] == pytest.approx(expected[1], abs=1e-5), ours
