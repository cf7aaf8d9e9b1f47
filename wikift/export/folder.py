"""The directory that an export becomes: nothing foreign is overwritten, and it is shown whole or not at all.

It is written beside its place (`.NAME.partial`) and renamed in; an earlier export there is renamed out and deleted
after that.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wikift.base import folders
from wikift.base.command import command_line
from wikift.base.errors import EnvironmentFault, UserError
from wikift.base.files import sync_folder
from wikift.base.sizes import show_bytes

FORMAT = "wikift-export-1"


def check_target(target: Path, identity: Any, *, own: bool) -> None:
    """Raises UserError where something lies at `target` that is not an export of this run (in RUN/hf: any export)."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir():
        raise UserError(f"--out {target}: is a file; name a folder")
    try:
        there = json.loads((target / folders.EXPORT_RECORD).read_text(encoding="utf-8"))
        found = there["run"] if there["format"] == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError):
        found = None
    if found is None:
        raise UserError(
            f"--out {target}: holds something that wikift did not export; name another folder or move it away"
        )
    if found != identity and not own:
        name = found.get("name") if isinstance(found, dict) else found
        raise UserError(f"--out {target}: holds the model of another run ({name}); name another folder or move it away")


@contextlib.contextmanager
def published(target: Path) -> Iterator[Path]:
    """A folder to write into; it becomes `target` when all went well and is gone otherwise."""
    partial = target.absolute().with_name(f".{target.absolute().name}.partial")
    old = partial.with_suffix(".old")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(partial, os.O_RDONLY)
    except OSError as error:
        raise EnvironmentFault(
            f"{target}: cannot be made ({error.strerror}), nothing was changed; make the model elsewhere, by "
            f"{command_line('consolidate')} with another --out"
        ) from None
    try:
        if not _is_ours(lock, partial):
            raise EnvironmentFault(f"{target}: another process is making it at this moment; try again after it")
        try:
            if old.exists() and not target.exists():  # one that was killed between its two renames
                os.rename(old, target)
            for left in [*partial.iterdir(), *([old] if old.exists() else [])]:  # of one that was killed
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


def _is_ours(lock: int, partial: Path) -> bool:
    """Take the lock on the open folder `partial`; False where another process has it, or has just published it."""
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
    if target.exists() and any(target.iterdir()):
        os.rename(target, old)
        try:
            os.rename(partial, target)
        except OSError:
            os.rename(old, target)
            raise
    else:
        os.rename(partial, target)
    sync_folder(partial.parent)


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
