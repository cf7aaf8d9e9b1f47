"""A folder is written aside and published by one rename: it is complete or not there, and one process writes it.

`.NAME.partial` beside NAME is what is being written, `.NAME.lock` says by whom: a lock (flock) ends with the process
that holds it, however that ends, and what an interrupted process left is removed by the next one.
"""

from __future__ import annotations

import os
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from wikift.base.files import faults_of_writing, remove, sync
from wikift.base.signals import ENDING, stopping_by_exception

_POLL_SECONDS = 0.5


def make_once(
    out: Path, make: Callable[[Path], None], *, is_made: Callable[[], bool], wait: Callable[[], None]
) -> None:
    """Return when `out` is published: made by this process with `make(partial)`, or by another one that it waited for.

    `wait` is called once, before waiting. Raises UserError where `out` can't be written, EnvironmentFault where the
    disk is full. Nothing incomplete stays, unless the process is killed outright.
    """
    with faults_of_writing(out), stopping_by_exception(), folders_above(out):
        if is_made():
            if lock_file(out).exists():  # of a process that was killed after the rename
                with suppress(OSError), folder_lock(out, timeout_seconds=0):
                    pass
            return
        with folder_lock(out, on_wait=wait):
            if not is_made():
                with publish_folder(out, replace=False) as partial:
                    make(partial)


def lock_file(folder: Path) -> Path:
    """The file whose lock is the right to write `folder`."""
    return folder.absolute().with_name(f".{folder.absolute().name}.lock")


@contextmanager
def folder_lock(
    folder: Path, timeout_seconds: float | None = None, on_wait: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Hold the right to write `folder`, after calling `on_wait` where another process has it.

    Raises TimeoutError after `timeout_seconds` of waiting. A file system without file locks gets a file that tells who
    holds it.
    """
    from filelock import FileLock, Timeout

    with tempfile.TemporaryFile(dir=folder.absolute().parent):  # where nothing can be made filelock would wait for ever
        lock = FileLock(lock_file(folder))
    try:
        with warnings.catch_warnings():  # of its fallback
            warnings.simplefilter("ignore")
            lock.acquire(blocking=False)
    except Timeout:
        on_wait()
        lock.acquire(timeout_seconds if timeout_seconds is not None else -1, poll_interval=_POLL_SECONDS)
    try:
        yield
    finally:
        # while it is held: who waits sees that the file has gone, and makes another
        lock_file(folder).unlink(missing_ok=True)
        lock.release()


@contextmanager
def publish_folder(target: Path, *, replace: bool) -> Iterator[Path]:
    """A folder to write into; it becomes `target` when all went well, and is removed otherwise.

    To be used under `folder_lock`. With `replace` an earlier `target` is moved away first and removed afterwards, else
    it must be missing or empty. Links are removed and never followed.
    """
    target = target.absolute()
    partial, old = (target.with_name(f".{target.name}.{kind}") for kind in ("partial", "old"))
    if old.is_dir() and not old.is_symlink() and not os.path.lexists(target):  # killed between the two renames
        os.rename(old, target)
    remove(partial, old)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in (*partial.rglob("*"), partial):  # before an earlier folder is moved away and removed
            sync(path)
        if replace and os.path.lexists(target):
            os.rename(target, old)
        try:
            os.rename(partial, target)
        except OSError:
            if replace and os.path.lexists(old):
                os.rename(old, target)
            raise
        sync(target.parent)
    finally:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # a second Ctrl-C waits for the clean-up
        remove(partial, *([old] if replace and target.exists() else []))
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def folders_above(out: Path) -> Iterator[None]:
    """Make the folders above `out`; where what follows fails, remove those again."""
    made = [folder for folder in out.absolute().parents if not folder.exists()]
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for folder in made:
                folder.rmdir()
        raise
