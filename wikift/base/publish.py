"""A folder is written aside and published by one rename: it is complete or not there, and one process writes it.

`.NAME.partial` beside NAME is what is being written, `.NAME.lock` says by whom: a lock (flock) ends with the process
that holds it, however that ends, and what an interrupted process left is removed by the next one.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from wikift.base.files import faults_of_writing, sync_folder
from wikift.base.launcher import launch
from wikift.base.signals import ENDING, stopping_by_exception

_POLL_SECONDS = 0.5
_HEAD_START_SECONDS = 10.0
_NO_LOCKS = (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def make_once(
    out: Path, make: Callable[[Path], None], *, is_made: Callable[[], bool], wait: Callable[[], None]
) -> None:
    """Return when `out` is published: made by this process with `make(partial)`, or by another one that it waited for.

    `wait` is called once, before waiting. Raises UserError where `out` can't be written, EnvironmentFault where the
    disk is full. Nothing incomplete stays, unless the process is killed outright.
    """
    with faults_of_writing(out), stopping_by_exception(), folders_above(out):
        if launch().local_rank and not is_made():
            # Of one machine's ranks the first prepares, if it comes in time: its error messages are the ones shown
            wait()
            wait, start = (lambda: None), time.monotonic()
            while not is_made() and not lock_file(out).exists() and time.monotonic() - start < _HEAD_START_SECONDS:
                time.sleep(_POLL_SECONDS)
        if is_made():
            return
        with folder_lock(out, on_wait=wait) as locked:
            if is_made():
                return
            try:
                with publish_folder(out, replace=False, locked=locked) as partial:
                    make(partial)
            except OSError as error:  # without locks another process may have been first, with the same content
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not is_made():
                    raise


def lock_file(folder: Path) -> Path:
    """The file whose lock is the right to write `folder`."""
    return folder.absolute().with_name(f".{folder.absolute().name}.lock")


@contextmanager
def folder_lock(
    folder: Path, timeout_seconds: float | None = None, on_wait: Callable[[], None] = lambda: None
) -> Iterator[bool]:
    """Hold the right to write `folder`, after calling `on_wait` where another process has it; False without file locks.

    Raises TimeoutError after `timeout_seconds` of waiting.
    """
    from filelock import FileLock, Timeout, UnixFileLock

    lock = FileLock(lock_file(folder))
    try:
        try:
            lock.acquire(blocking=False)
        except Timeout:
            on_wait()
            lock.acquire(timeout_seconds if timeout_seconds is not None else -1, poll_interval=_POLL_SECONDS)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        lock_file(folder).unlink(missing_ok=True)
        yield False
        return
    try:
        yield True
    finally:
        if isinstance(lock, UnixFileLock):  # while it is held: who waits sees that the file has gone, and makes another
            lock_file(folder).unlink(missing_ok=True)
        lock.release()


@contextmanager
def publish_folder(target: Path, *, replace: bool, locked: bool = True) -> Iterator[Path]:
    """A folder to write into; it becomes `target` when all went well, and is removed otherwise.

    To be used under `folder_lock`; where that is not `locked`, the folder's name is this process's own. With `replace`
    an earlier `target` is moved away first and removed afterwards, else it must be missing or empty.
    """
    target = target.absolute()
    own = "" if locked else f"-{os.uname().nodename}-{os.getpid()}"
    partial, old = (target.with_name(f".{target.name}.{kind}") for kind in (f"partial{own}", "old"))
    if old.exists() and not target.exists():  # a process was killed between its two renames
        os.rename(old, target)
    _remove(partial, old)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in (*filter(Path.is_dir, partial.iterdir()), partial):
            sync_folder(path)
        if replace and target.exists():
            os.rename(target, old)
        try:
            os.rename(partial, target)
        except OSError:
            if replace and old.exists():
                os.rename(old, target)
            raise
        sync_folder(target.parent)
    finally:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # a second Ctrl-C waits for the clean-up
        _remove(partial, *([old] if replace and target.exists() else []))
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


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
