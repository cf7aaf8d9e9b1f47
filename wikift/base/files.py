"""Files: checksums, ranges, sizes, and text and JSON that survive a power cut."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wikift.base.errors import EnvironmentFault, UserError

_BLOCK_BYTES = 1 << 20
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NAMES = "EACCES EPERM EROFS EEXIST EISDIR ENOTDIR ENOTEMPTY ENAMETOOLONG ELOOP"
_NOT_HERE = {getattr(errno, name) for name in _NAMES.split()}


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Put a file's content, or the names in a folder, on the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(*paths: Path) -> None:
    """Remove files, folders and links, which are not followed; what is not there is no error."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Write a file aside and rename it into place."""
    aside = path.with_name(path.name + ".partial")
    aside.unlink(missing_ok=True)
    with open(aside, "x", encoding="utf-8") as file:  # a link that somebody put there is not followed
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    sync(path.parent)


def json_line(content: object) -> str:
    """JSON on one line, without a character that a terminal obeys, or that cannot be written."""
    text = json.dumps(content, ensure_ascii=False)
    return re.sub("[\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)


def replace_json(path: Path, content: Mapping[str, object]) -> None:
    replace_text(path, json.dumps(content, indent=1, ensure_ascii=False))


def parse_object(text: str | bytes) -> dict[str, Any]:
    """The JSON object that `text` is. Raises ValueError where it is none."""
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("no JSON object")
    return content


def content_of(path: Path) -> bytes:
    """A file's bytes. Raises OSError where it is none: a pipe or a device may have no end."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "no regular file", str(path))
    return path.read_bytes()


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`, empty where there is none. Raises EnvironmentFault where the disk fails."""
    try:
        return parse_object(content_of(path))
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.EIO:
            raise EnvironmentFault(f"{path}: cannot be read ({error.strerror}); see to the disk") from None
        return {}


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """`content` with a digest over all else in it."""
    return {**content, "sha256": digest(content)}


def digest(content: Mapping[str, Any]) -> str:
    rest = json.loads(json.dumps({key: value for key, value in content.items() if key != "sha256"}))
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def sums(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file in `folder`, by name."""
    return {path.name: sha256_of(path) for path in sorted(folder.glob("*")) if path.is_file()}


LFS_POINTER = b"version https://git-lfs"  # how one starts


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is what `git clone` leaves of a large one where Git LFS is not installed."""
    try:
        with open(path if path.is_file() else os.devnull, "rb") as file:
            return file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return False


def read_range(path: Path, offset: int, into: memoryview) -> None:
    """Fill `into` (bytes) from a file's `offset` on, reading these bytes only. Raises OSError where the file ends."""
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        while into:
            count = file.readinto(into)
            if not count:
                raise OSError(f"{path} ends early")
            into = into[count:]


def read_lines(path: Path, setting: str) -> list[str]:
    """The lines of a UTF-8 file that are not blank. Raises UserError where it cannot be read or has none."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{setting} {path}: cannot be read ({error.strerror}); name a text file") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{setting} {path}: line {line} is not UTF-8; save the file as UTF-8") from None
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        raise UserError(f"{setting} {path}: has no prompt in it; write one a line")
    return lines


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one on each line, none where it is missing; a line torn by a kill is omitted."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):  # U+2028 in a text ends no line
            with contextlib.suppress(ValueError):
                rows.append(parse_object(line))
    return rows


def parse_size(text: str, setting: str = "--max-shard-size") -> int:
    """`5GB`, `500 MB`, `1GiB` or a number of bytes -> bytes. Raises UserError otherwise."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]I?B)?", text.strip().upper())
    size = int(float(match[1]) * _UNITS.get(match[2] or "", 0)) if match else 0
    if size < 1:
        raise UserError(f"{setting} {text}: must be a number and KB, MB, GB, TB, KiB, MiB or GiB; try 5GB")
    return size


def show_bytes(count: int) -> str:
    """5.00 GB, 12.3 MB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


@contextmanager
def faults_of_writing(out: Path) -> Iterator[None]:
    """OSErrors of writing `out` as messages for the user."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise EnvironmentFault(
                f"{out}: the disk is full ({error.strerror}); free disk space or write to another disk, and run the "
                "command again"
            ) from None
        # ENOENT: nothing can be made in /proc
        if error.errno in _NOT_HERE or (
            error.errno == errno.ENOENT and str(error.filename).startswith(str(out.parent))
        ):
            raise UserError(
                f"{out}: cannot be written ({error.strerror}: {error.filename}); name another folder"
            ) from None
        if error.errno == errno.EIO:
            raise EnvironmentFault(f"{out}: I/O error ({error}); use another disk") from None
        raise
