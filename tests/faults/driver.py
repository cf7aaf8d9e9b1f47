"""Commands as children forked from this process, which has loaded everything, and what strikes them.

A library that is preloaded (strike.c) lets one call that changes a file below a folder, or reads it, fail, or be the
process' last; signals come at a moment.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

SOURCE = Path(__file__).with_name("strike.c")
CHECKOUT = Path(__file__).resolve().parents[2]
KINDS = ("count", "kill", "full", "broken", "short", "unreadable")  # strike.c's, in its order
SECONDS = 100.0  # until a command hangs; a rank that freezes at the end, or before all watch, is missed after 66
LAUNCHER_SECONDS = 20.0  # until a launcher kills those who wait for one that ended before it met them
HUNG = 124


class Point(NamedTuple):
    """The call of `rank` that is struck: the `number`-th `call` of `path`, a file below the command's folder."""

    kind: str
    rank: int
    call: str
    path: str
    number: int

    def __str__(self) -> str:
        return " ".join(map(str, self))


def parsed(text: str) -> Point:
    """The point that is shown as `text`."""
    kind, rank, call, *path, number = text.split(" ")
    return Point(kind, int(rank), call, " ".join(path), int(number))


NOWHERE = Point("count", 0, "", "", 0)  # no fault


class Blow(NamedTuple):
    """A signal to a rank, or to all (None), `seconds` after a file is there; SIGSTOP is followed by SIGCONT, or not."""

    seconds: float
    signal: int
    rank: int | None = None
    after: str = "."
    frozen: bool = False


class Ended(NamedTuple):
    """A command's end: its exit code on each rank, what was printed, each rank's calls, whether anything was struck."""

    codes: list[int]
    output: str
    calls: list[list[list[str]]]
    struck: bool

    @property
    def good(self) -> bool:
        return not any(self.codes)


def run(root: Path, line: Sequence[str], ranks: int = 1, point: Point = NOWHERE, blow: Blow | None = None) -> Ended:
    """A command on `ranks` ranks, struck at `point` or by `blow`. One that hangs has code 124.

    When a rank is killed at a point all are, as by a power cut; a launcher ends those that another's end leaves.
    """
    logs = _empty(root.parent / "logs")
    port, host = _store_host() if ranks > 1 else (0, 0)
    children = [_fork(root, logs, _words(root, line), rank, ranks, point, port) for rank in range(ranks)]
    patience = 2.0 if blow is not None and blow.frozen else LAUNCHER_SECONDS
    codes, began, failed, moment, sent = [HUNG] * ranks, time.monotonic(), 0.0, 0.0, False
    while waiting := [rank for rank in range(ranks) if codes[rank] == HUNG]:
        seconds = time.monotonic() - began
        if blow is not None and not moment and (root / blow.after).exists():
            moment = seconds + blow.seconds
        if blow is not None and moment and seconds > moment:
            _signal([children[rank] for rank in waiting if blow.rank in (None, rank)], blow.signal)
            again = blow._replace(seconds=0.3, signal=signal.SIGCONT)
            blow, moment, sent = again if blow.signal == signal.SIGSTOP and not blow.frozen else None, 0.0, True
        late = seconds > SECONDS
        failed = failed or seconds * any(code not in (0, 75, HUNG) for code in codes)
        launcher = failed and seconds > failed + patience
        if late or launcher or (point.kind == "kill" and -signal.SIGKILL in codes):
            _signal([children[rank] for rank in waiting], signal.SIGKILL)
        for rank in waiting:
            done, status = os.waitpid(children[rank], 0 if late else os.WNOHANG)
            if done and not late:
                codes[rank] = os.waitstatus_to_exitcode(status)
        if late:
            break
        time.sleep(0.002)
    if host:
        _signal([host], signal.SIGKILL)
        os.waitpid(host, 0)
    calls = [[text.split("\t") for text in (logs / f"calls.{rank}").read_text().splitlines()] for rank in range(ranks)]
    struck = sent or any(call[0].startswith("! ") for call in calls[point.rank])
    return Ended(codes, (logs / "output").read_text(errors="replace"), calls, struck)


def torchrun(root: Path, line: Sequence[str], ranks: int, blow: Blow) -> Ended:
    """A command under a real torchrun, to which `blow` goes; its exit code. What runs a minute after it is killed."""
    logs = _empty(root.parent / "logs")
    options = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "wikift"]
    with open(logs / "output", "ab") as output:
        launcher = subprocess.Popen(
            [sys.executable, *options, *_words(root, line)],
            stdout=output, stderr=output, env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        )  # fmt: skip
    sent, deadline = False, time.monotonic() + SECONDS
    while launcher.poll() is None and time.monotonic() < deadline:
        if not sent and (root / blow.after).exists():
            time.sleep(blow.seconds)
            launcher.send_signal(blow.signal)
            sent = True
        time.sleep(0.01)
    code = HUNG if launcher.poll() is None else launcher.returncode
    if code == HUNG:
        launcher.kill()
        launcher.wait()
    return Ended([code], (logs / "output").read_text(errors="replace"), [], sent)


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def _words(root: Path, line: Sequence[str]) -> list[str]:
    return [word.replace("ROOT", str(root)) for word in line]


def _signal(pids: Sequence[int], number: int) -> None:
    for pid in pids:
        os.kill(pid, number)


def _store_host() -> tuple[int, int]:
    """A process in which the ranks meet, as they do in torchrun's: its port, its id."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        from torch.distributed import TCPStore

        store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        os.write(writing, str(store.port).encode())
        while True:
            signal.pause()
    os.close(writing)
    port = int(os.read(reading, 9))
    os.close(reading)
    return port, child


def _fork(root: Path, logs: Path, words: list[str], rank: int, ranks: int, point: Point, port: int) -> int:
    child = os.fork()
    if child == 0:
        output = os.open(logs / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        calls = os.open(logs / f"calls.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
        if ranks > 1:
            os.environ |= {name: str(value) for name, value in own.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
        own_point = point if rank == point.rank else NOWHERE
        kind, path = KINDS.index(own_point.kind), str(root / own_point.path)
        ctypes.CDLL(None).strike(
            str(root).encode(), kind, own_point.call.encode(), path.encode(), own_point.number, calls
        )
        _command(words)
    return child


def _command(words: list[str]) -> NoReturn:
    from wikift.commands.main import main, run

    sys.argv = ["wikift", *words]
    code: Any = 99
    try:
        run(main, words)
    except SystemExit as exit:
        code = exit.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def preloaded(module: str, words: Sequence[str]) -> None:
    """Start this program again with the library loaded, where it is not; compiled for each start."""
    if "strike.so" in os.environ.get("LD_PRELOAD", ""):
        return
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "strike.so"
        subprocess.run(
            [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-O1", SOURCE, "-o", library, "-ldl"], check=True
        )
        env = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        env["GIT_DIR"] = os.devnull  # config.json has the commit, which may change meanwhile
        sys.exit(subprocess.run([sys.executable, "-m", module, *words], env=env).returncode)


def load() -> None:
    """What the commands import and look up, once, and that orphans of theirs are this process' to see."""
    import importlib

    from transformers import GenerationConfig

    for module in ("tests.preload", "transformers.models.gpt2.modeling_gpt2", "wikift.training.run"):
        importlib.import_module(module)
    for command in ("prepare", "consolidate", "runs", "train"):
        importlib.import_module(f"wikift.commands.{command}")
    os.environ.pop("LOCAL_RANK", None)  # DeepSpeed's import set it
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    from wikift.base import failure
    from wikift.model.gpt2 import model_config, shapes_of

    config = model_config({"n_layer": 1, "n_head": 2, "n_embd": 8})
    shapes_of(config)
    GenerationConfig.from_model_config(config)
    failure._GRACE_SECONDS = 0.5
