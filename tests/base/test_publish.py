# python -m pytest tests/base/test_publish.py
"""One process makes a folder, the others wait; it is there whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import itertools
import multiprocessing
import os
import shutil
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
from wikift.base.errors import EnvironmentFault, UserError
from wikift.base.files import read_json, replace_text
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
    left = tmp_path / "a" / ".b.partial"  # by a killed process
    (left / "deep").mkdir(parents=True)
    (left / "link").symlink_to(tmp_path)
    out.mkdir()  # an empty folder is taken
    assert once(out) == []
    assert everything(tmp_path) == ["a", "a/b", "a/b/inner", "a/b/part", "a/b/store.json"]
    once(out, lambda folder: pytest.fail("made again"))


@pytest.mark.parametrize("name", [".out.partial", ".out.old", ".out.lock", "out"])
@pytest.mark.parametrize("to", ["folder", "file", "nothing"])
def test_no_link_is_followed(tmp_path: Path, name: str, to: str) -> None:
    """Links that somebody put beside a folder, or in its place: what they lead to stays as it is."""
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder" / "mine", tmp_path / "file"):
        path.write_text("mine")
    before = everything(tmp_path)
    (tmp_path / name).symlink_to(to)
    for _ in range(2):
        try:
            with folder_lock(tmp_path / "out"), publish_folder(tmp_path / "out", replace=True) as partial:
                fill(partial)
        except OSError:
            assert name == ".out.lock"
        else:
            assert "out/store.json" in everything(tmp_path)
            assert not (tmp_path / "out").is_symlink()
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    (tmp_path / name).unlink(missing_ok=True)
    assert everything(tmp_path) == before
    assert {path.read_text() for path in (tmp_path / "folder" / "mine", tmp_path / "file")} == {"mine"}
    (tmp_path / "text.partial").symlink_to("file")
    replace_text(tmp_path / "text", "new")
    assert ((tmp_path / "text").read_text(), (tmp_path / "file").read_text()) == ("new", "mine")


FAULTS: list[tuple[BaseException, type[BaseException], str]] = [
    (UserError("no"), UserError, "no"),
    (KeyboardInterrupt("now"), KeyboardInterrupt, "now"),
    (ValueError("bug"), ValueError, "bug"),
    (
        OSError(errno.ENOSPC, "full"),
        EnvironmentFault,
        r"c: the disk is full \(.*\); free disk space",
    ),
    (OSError(errno.EDQUOT, "full"), EnvironmentFault, "the disk is full"),
    (OSError(errno.EIO, "broken"), EnvironmentFault, "I/O error"),
    (OSError(errno.EROFS, "fixed"), UserError, r"c: cannot be written \(.*\); name another folder"),
    (OSError(errno.EACCES, "no"), UserError, "cannot be written"),
]


@pytest.mark.parametrize(("fault", "kind", "message"), FAULTS, ids=[repr(fault) for fault, _, _ in FAULTS])
def test_nothing_stays_of_what_fails(
    tmp_path: Path, fault: BaseException, kind: type[BaseException], message: str
) -> None:
    def broken(folder: Path) -> None:
        fill(folder)
        raise fault

    with pytest.raises(kind, match=message):
        once(tmp_path / "a" / "b" / "c", broken)
    assert everything(tmp_path) == []


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


def one_process(out: Path, pipe: Any) -> None:
    def slow(folder: Path) -> None:
        pipe.send("making")
        while not (out.parent / "go").exists():
            time.sleep(0.05)
        fill(folder)

    make_once(out, slow, is_made=(out / "store.json").exists, wait=lambda: pipe.send("waiting"))
    pipe.send("done")


def started(out: Path) -> tuple[Any, Any]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=one_process, args=(out, theirs))
    process.start()
    return process, ours


def received(pipe: Any) -> Any:
    assert pipe.poll(60), "nothing came"
    return pipe.recv()


def test_one_works_and_the_others_wait(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first, pipe = started(out)
    assert received(pipe) == "making"
    others = [started(out) for _ in range(2)]
    assert [received(end) for _, end in others] == ["waiting"] * 2
    (tmp_path / "go").touch()
    assert [received(end) for end in (pipe, *(end for _, end in others))] == ["done"] * 3
    for process in (first, *(process for process, _ in others)):
        process.join()
    assert everything(tmp_path) == ["go", "out", "out/inner", "out/part", "out/store.json"]
    assert (out / "part").read_text() == str(first.pid)


def test_who_waits_takes_over_from_a_killed_one(tmp_path: Path) -> None:
    first, pipe = started(tmp_path / "out")
    assert received(pipe) == "making"
    second, other = started(tmp_path / "out")
    assert received(other) == "waiting"
    first.kill()
    assert received(other) == "making"
    (tmp_path / "go").touch()
    assert received(other) == "done"
    second.join()
    assert everything(tmp_path) == ["go", "out", "out/inner", "out/part", "out/store.json"]


def test_without_file_locks_one_works_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", mock.Mock(side_effect=OSError(errno.ENOSYS, "no locks here")))
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
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        once(tmp_path / "out", lambda folder: (os.kill(os.getpid(), signal.SIGHUP), fill(folder)))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (tmp_path / "out" / "store.json").exists()


def test_what_the_disk_does_not_let_read_is_not_taken_for_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wikift.json").write_text('{"files": {}}')
    assert read_json(tmp_path / "none.json") == {}
    monkeypatch.setattr(Path, "read_bytes", mock.Mock(side_effect=OSError(errno.EIO, "Input/output error")))
    with pytest.raises(EnvironmentFault, match=r"wikift\.json: cannot be read"):
        read_json(tmp_path / "wikift.json")
