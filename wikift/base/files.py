"""What is on the disk: checksums, names and JSON that survive a power cut."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from wikift.base.errors import EnvironmentFault, UserError

_BLOCK_BYTES = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_HERE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOTEMPTY, errno.ENAMETOOLONG)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in blocks of a megabyte."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def sync_folder(path: Path) -> None:
    """Put the names in a folder on the disk, as `fsync` does for a file's content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_json(path: Path, content: Mapping[str, object]) -> None:
    """Write a JSON file aside and rename it into place."""
    aside = path.with_name(path.name + ".partial")
    with open(aside, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def read_range(path: Path, offset: int, into: memoryview) -> None:
    """Fill `into` (bytes) from a file's `offset` on, reading these bytes only. Raises OSError where the file ends."""
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        while into:
            count = file.readinto(into)
            if not count:
                raise OSError(f"{path} ends early")
            into = into[count:]


@contextmanager
def faults_of_writing(out: Path) -> Iterator[None]:
    """OSErrors of writing `out` as messages for the user."""
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
