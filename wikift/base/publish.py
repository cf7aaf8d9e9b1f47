"""Make a folder by one process while others wait for it, and show it whole or not at all.

OUT is written as `.NAME.partial` beside it and renamed at the end. The right to write is a lock (flock) on that folder,
so it ends with the process that holds it, however that ends: what a killed process left is cleared by the next one.
Needs no process group and knows no time limit. Costs two polls a second for those who wait.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from wikift.base.errors import EnvironmentFault, UserError
from wikift.base.files import sync_folder

_POLL_SECONDS = 0.5
_HEAD_START_SECONDS = 10.0
_NO_FLOCK = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def make_once(
    out: Path, make: Callable[[Path], None], *, is_made: Callable[[], bool], say: Callable[[str], None]
) -> None:
    """Return when `out` is there: made by this process with `make(partial)`, or by another that this one waited for.

    `is_made` tells whether it is published. Raises UserError where `out` can't be written, EnvironmentFault where the
    disk is full. Whatever ends it, nothing half done stays, save where the process is killed outright.
    """
    partial = out.parent / f".{out.name}.partial"
    with _faults_of_writing(out), stopping_by_exception(), _parents_of(out):
        lock = _take(partial, is_made, lambda: say(f"waiting for another process that is preparing {out}"))
        if lock is None:
            return
        descriptor, folder = lock
        try:
            make(folder)
            sync_folder(folder)
            _publish(folder, out, is_made)
        finally:
            with _holding_signals():
                shutil.rmtree(folder, ignore_errors=True)
            if descriptor is not None:
                os.close(descriptor)


@contextmanager
def _parents_of(out: Path) -> Iterator[None]:
    """Make the folders above `out`, and where it fails take those that were made for it away again."""
    made = [folder for folder in out.parents if not folder.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for folder in made:
                folder.rmdir()
        raise


def _take(
    partial: Path, is_made: Callable[[], bool], say_waiting: Callable[[], None]
) -> tuple[int | None, Path] | None:
    """The lock and the empty folder that it is on, or None once another process has published."""
    # Of one machine's ranks the first prepares, if it comes in time: it is the one whose error messages are shown
    head_start = _HEAD_START_SECONDS if os.environ.get("LOCAL_RANK", "0") != "0" else 0.0
    free_since, waited = time.monotonic(), False
    while not is_made():
        may_take = time.monotonic() - free_since >= head_start
        if may_take or partial.is_dir():
            partial.mkdir(exist_ok=True)
            try:
                descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:
                continue
            state = _lock(descriptor, partial)
            if state == "unsupported":  # everybody prepares, the first to finish wins
                os.close(descriptor)
                with suppress(OSError):
                    partial.rmdir()
                folder = partial.with_name(f"{partial.name}-{os.uname().nodename}-{os.getpid()}")
                folder.mkdir(exist_ok=True)
                return None, folder
            if state == "ours" and may_take:
                if is_made():  # published between the look and the lock; the folder is a new one, and empty
                    with suppress(OSError):
                        partial.rmdir()
                    os.close(descriptor)
                    return None
                _clear(partial)
                return descriptor, partial
            os.close(descriptor)
            if state == "other's":
                free_since = time.monotonic()
            if state == "gone":
                continue
        if not waited:
            say_waiting()
            waited = True
        time.sleep(_POLL_SECONDS)
    return None


def _lock(descriptor: int, partial: Path) -> str:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "other's"
    except OSError as error:
        if error.errno in _NO_FLOCK:
            return "unsupported"
        raise
    try:
        here = os.stat(partial)
    except FileNotFoundError:
        return "gone"
    mine = os.fstat(descriptor)
    return "ours" if (here.st_dev, here.st_ino) == (mine.st_dev, mine.st_ino) else "gone"


def _clear(folder: Path) -> None:
    for left in folder.iterdir():
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        else:
            left.unlink()


def _publish(folder: Path, out: Path, is_made: Callable[[], bool]) -> None:
    try:
        os.rename(folder, out)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST) and is_made():
            return  # without locks another process may have been first, with the same content
        raise
    sync_folder(out.parent)


_NOT_HERE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOTEMPTY, errno.ENAMETOOLONG)


@contextmanager
def _faults_of_writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise EnvironmentFault(
                f"{out}: the disk is full ({error.strerror}); nothing was kept. Free space, or put it on another disk, "
                "and run the command again"
            ) from None
        below = str(error.filename).startswith(str(out.parent))
        if error.errno in _NOT_HERE or (error.errno == errno.ENOENT and below):  # nothing can be made in /proc
            raise UserError(f"{out}: cannot be written ({error.strerror}); name another folder") from None
        if error.errno == errno.EIO:
            raise EnvironmentFault(
                f"{out}: the disk fails ({error}); nothing was kept. Put it on another disk"
            ) from None
        raise


@contextmanager
def stopping_by_exception() -> Iterator[None]:
    """Within, SIGINT raises KeyboardInterrupt, and SIGTERM and SIGHUP SystemExit, so that clean-up runs.

    Ignored signals stay ignored (nohup). Does nothing outside of the main thread, which alone may set handlers.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    wanted = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: leave, signal.SIGHUP: leave}
    before = {number: signal.getsignal(number) for number in wanted}
    for number, handler in wanted.items():
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)


@contextmanager
def _holding_signals() -> Iterator[None]:
    """An impatient second Ctrl-C waits until the clean-up is done."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
