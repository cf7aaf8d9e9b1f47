# python -m pytest tests/base/test_publish.py
"""One process makes a folder, the others wait; it is there whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.tiny import arguments, tiny_store
from wikift.base import publish
from wikift.base.errors import EnvironmentFault, UserError
from wikift.base.publish import folder_lock, make_once, publish_folder

ROOT = Path(__file__).resolve().parents[2]


def fill(folder: Path) -> None:
    (folder / "part").write_text(str(os.getpid()))
    (folder / "inner").mkdir()
    (folder / "store.json").write_text("{}")


def once(out: Path, make: Any = fill) -> list[str]:
    said: list[str] = []
    make_once(out, make, is_made=(out / "store.json").exists, wait=lambda: said.append("waiting"))
    return said


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_it_is_made_once(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    assert once(out) == []
    assert everything(tmp_path) == ["a", "a/b", "a/b/inner", "a/b/part", "a/b/store.json"]
    once(out, lambda folder: pytest.fail("made again"))
    empty = tmp_path / "empty"
    empty.mkdir()
    once(empty)
    assert (empty / "store.json").exists(), "an empty folder is taken"


@pytest.mark.parametrize("fault", [UserError("no"), KeyboardInterrupt(), SystemExit(143), ValueError("bug")])
def test_nothing_stays_of_what_fails(tmp_path: Path, fault: BaseException) -> None:
    def broken(folder: Path) -> None:
        fill(folder)
        raise fault

    with pytest.raises(type(fault)):
        once(tmp_path / "a" / "b" / "c", broken)
    assert everything(tmp_path) == []


def test_leftovers_of_a_killed_process_are_cleared(tmp_path: Path) -> None:
    left = tmp_path / ".out.partial"
    (left / "deep").mkdir(parents=True)
    (left / "deep" / "file").write_text("old")
    (left / "link").symlink_to(tmp_path)
    once(tmp_path / "out")
    assert everything(tmp_path) == ["out", "out/inner", "out/part", "out/store.json"]


def test_a_lock_whose_file_was_removed_is_not_held_twice(tmp_path: Path) -> None:
    """Who waits for a lock gets the one of the file that is there, not of that which the holder removed at its end."""
    order: list[str] = []

    def second() -> None:
        with folder_lock(tmp_path / "out", on_wait=lambda: order.append("waits")):
            order.append("second")
            time.sleep(1)
            order.append("second ends")

    thread = threading.Thread(target=second)
    with folder_lock(tmp_path / "out"):
        thread.start()
        time.sleep(0.3)
        order.append("first ends")
    time.sleep(1)
    with folder_lock(tmp_path / "out"):
        order.append("third")
    thread.join()
    assert order == ["waits", "first ends", "second", "second ends", "third"]
    assert everything(tmp_path) == []
    with folder_lock(tmp_path / "out"), pytest.raises(TimeoutError):
        folder_lock(tmp_path / "out", timeout_seconds=0.1).__enter__()


def waiting(out: Path, seconds: float, pipe: Any, local_rank: str = "0") -> None:
    os.environ["LOCAL_RANK"] = local_rank

    def slow(folder: Path) -> None:
        pipe.send("making")
        time.sleep(seconds)
        fill(folder)

    pipe.send(once(out, slow))


def started(out: Path, seconds: float, local_rank: str = "0") -> tuple[Any, Any]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=waiting, args=(out, seconds, theirs, local_rank))
    process.start()
    return process, ours


def received(pipe: Any) -> Any:
    assert pipe.poll(60), "nothing came"
    return pipe.recv()


def test_one_works_and_the_others_wait(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first, pipe = started(out, 2)
    assert received(pipe) == "making"
    others = [started(out, 0) for _ in range(2)]
    for process, other in others:
        assert received(other) == ["waiting"]
        process.join()
    assert received(pipe) == []
    first.join()
    assert everything(tmp_path) == ["out", "out/inner", "out/part", "out/store.json"]
    assert (out / "part").read_text() == str(first.pid)


def test_who_waits_takes_over_from_a_killed_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first, pipe = started(out, 600)
    assert received(pipe) == "making"
    second, other = started(out, 0)
    assert not other.poll(2), "it waits"
    first.kill()
    assert received(other) == "making"
    assert received(other) == ["waiting"]
    second.join()
    assert everything(tmp_path) == ["out", "out/inner", "out/part", "out/store.json"]


def test_of_the_ranks_of_a_machine_the_first_prepares(tmp_path: Path) -> None:
    out = tmp_path / "out"
    second, other = started(out, 0, local_rank="1")
    assert not other.poll(2), "it leaves the first one its time"
    first, pipe = started(out, 0)
    assert received(pipe) == "making"
    assert received(pipe) == []
    assert received(other) == ["waiting"]
    first.join()
    second.join()
    assert (out / "part").read_text() == str(first.pid)


def test_a_rank_prepares_if_the_first_does_not_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".out.partial").mkdir()  # which an earlier process left
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(publish, "_HEAD_START_SECONDS", 1.2)
    start = time.monotonic()
    once(tmp_path / "out")
    assert 1.2 <= time.monotonic() - start < 10
    assert (tmp_path / "out" / "store.json").exists()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_file_locks_one_works_too(tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", mock.Mock(side_effect=OSError(number, "no locks here")))
    go, order = threading.Event(), list[str]()

    def slow(folder: Path) -> None:
        go.set()
        time.sleep(0.3)
        order.append("made")
        fill(folder)

    thread = threading.Thread(target=once, args=(tmp_path / "out", slow))
    thread.start()
    assert go.wait(10)
    make_once(
        tmp_path / "out", slow, is_made=(tmp_path / "out" / "store.json").exists, wait=lambda: order.append("wait")
    )
    thread.join()
    assert order == ["wait", "made"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


FAULTS = {
    errno.ENOSPC: (
        EnvironmentFault,
        r"out: the disk is full \(.*\); free disk space or write to another",
    ),
    errno.EDQUOT: (EnvironmentFault, "the disk is full"),
    errno.EIO: (EnvironmentFault, "I/O error"),
    errno.EROFS: (UserError, r"out: cannot be written \(.*\); name another folder"),
    errno.EACCES: (UserError, "cannot be written"),
}


@pytest.mark.parametrize("number", FAULTS, ids=errno.errorcode.get)
def test_faults_of_the_disk(tmp_path: Path, number: int) -> None:
    def full(folder: Path) -> None:
        fill(folder)
        raise OSError(number, os.strerror(number))

    kind, message = FAULTS[number]
    with pytest.raises(kind, match=message):
        once(tmp_path / "out", full)
    assert everything(tmp_path) == []


def test_a_second_run_in_a_folder_waits_for_the_first(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    program = [sys.executable, str(ROOT / "launch" / "train.py")]
    line = arguments(tiny_store(tmp_path / "store"), run, max_steps=1, quiet=False)
    with folder_lock(run / "run"):  # RUN/.run.lock
        second = subprocess.Popen([*program, *line], stdout=subprocess.PIPE, text=True)
        assert second.stdout is not None
        shown = list(itertools.takewhile(lambda text: "waiting" not in text, second.stdout))
        time.sleep(0.5)
        assert second.poll() is None, "it waits"
        assert not (run / "config.json").exists(), shown
    assert "step 1/1" in second.communicate(timeout=120)[0]
    assert second.returncode == 0
    assert not (run / ".run.lock").exists()


@pytest.mark.parametrize(
    ("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit), (signal.SIGHUP, SystemExit)]
)
def test_signals_end_it_and_leave_nothing(tmp_path: Path, number: signal.Signals, kind: type[BaseException]) -> None:
    seen: list[int] = []
    before = signal.signal(number, lambda *_: seen.append(1))  # as training has its own
    try:

        def signalled(folder: Path) -> None:
            fill(folder)
            os.kill(os.getpid(), number)
            time.sleep(5)

        with pytest.raises(kind):
            once(tmp_path / "out", signalled)
        assert everything(tmp_path) == []
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        assert seen == [1], "the handler of before is back"
    finally:
        signal.signal(number, before)


def test_ignored_signals_stay_ignored(tmp_path: Path) -> None:
    def hung_up(folder: Path) -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        fill(folder)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        once(tmp_path / "out", hung_up)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (tmp_path / "out" / "store.json").exists()


@pytest.mark.parametrize("fault", [None, ValueError("bug"), KeyboardInterrupt()])
def test_a_folder_is_replaced_in_full_or_stays(tmp_path: Path, fault: BaseException | None) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("")

    def replace() -> None:
        with publish_folder(out, replace=True) as partial:
            fill(partial)
            if fault is not None:
                raise fault

    if fault is None:
        replace()
    else:
        with pytest.raises(type(fault)):
            replace()
    assert everything(out) == (["old"] if fault is not None else ["inner", "part", "store.json"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_process_killed_between_two_renames_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "old").write_text("")

    def broken() -> None:
        with publish_folder(tmp_path / "out", replace=True):
            raise ValueError("bug")

    with pytest.raises(ValueError, match="bug"):
        broken()
    assert everything(tmp_path) == ["out", "out/old"]
