"""The folder that an export becomes: nothing that is not an export is overwritten, and it is complete or not there.

It is written as `.NAME.partial` beside `target` and renamed; an earlier export is renamed first, and removed at last.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wikift.base import folders
from wikift.base.errors import EnvironmentFault, UserError
from wikift.base.files import show_bytes, sync_folder

FORMAT = "wikift-export-1"


def check_target(target: Path, identity: dict[str, Any], *, own: bool) -> None:
    """Raises UserError where `target` is something else than an export of this run; in its `own` hf/, any export."""
    if target.is_file():
        raise UserError(f"--out {target}: is a file; name a folder")
    if not target.exists() or not any(target.iterdir()):
        return
    record = folders.read_json(target / folders.EXPORT_RECORD)
    if record.get("format") != FORMAT or not isinstance(record.get("run"), dict):
        raise UserError(
            f"--out {target}: holds something that wikift did not export; name another folder or move it away"
        )
    if record["run"] != identity and not own:
        name = record["run"].get("name")
        raise UserError(f"--out {target}: holds the model of another run ({name}); name another folder or move it away")


@contextlib.contextmanager
def published(target: Path) -> Iterator[Path]:
    """A folder to write into; it becomes `target` when all went well, and is removed otherwise."""
    partial = target.absolute().with_name(f".{target.absolute().name}.partial")
    old = partial.with_suffix(".old")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(partial, os.O_RDONLY)
    except OSError as error:
        raise EnvironmentFault(
            f"{target}: cannot be made ({error.strerror}), nothing was changed; name another --out"
        ) from None
    try:
        if not _locked(lock, partial):
            raise EnvironmentFault(
                f"{target}: another process is making it at this moment; run the command again after it"
            )
        try:
            if old.exists() and not target.exists():  # a process was killed between its two renames
                os.rename(old, target)
            for left in [*partial.iterdir(), *([old] if old.exists() else [])]:  # by a process that was killed
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield partial
            _swap(partial, target, old)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError):
                free = shutil.disk_usage(partial.parent).free
                raise EnvironmentFault(
                    f"{target} was not made: {error.strerror or error} ({show_bytes(free)} are free there); "
                    "make room or name another --out. What was there before still is"
                ) from None
            raise
    finally:
        os.close(lock)
    shutil.rmtree(old, ignore_errors=True)


def _locked(lock: int, partial: Path) -> bool:
    """Lock the open folder `partial`; False where another process has locked it, or has just published it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return partial.exists() and partial.stat().st_ino == os.fstat(lock).st_ino


def _swap(partial: Path, target: Path, old: Path) -> None:
    for path in (*partial.iterdir(), partial):
        sync_folder(path)
    replaces = target.exists()
    if replaces:
        os.rename(target, old)
    try:
        os.rename(partial, target)
    except OSError:
        if replaces:
            os.rename(old, target)
        raise
    sync_folder(partial.parent)
