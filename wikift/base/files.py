"""What is on the disk: checksums, names and JSON that survive a power cut."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from wikift.base.errors import UserError

_BLOCK_BYTES = 1 << 20


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


def read_lines(path: Path, setting: str) -> list[str]:
    """The lines of a UTF-8 file that are not blank. Raises UserError where it cannot be read or has none."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{setting} {path}: cannot be read ({error.strerror}); name a text file") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{setting} {path}: line {line} is not UTF-8 (byte {error.start}); save the file as UTF-8"
        ) from None
    lines = [line.removesuffix("\r") for line in text.split("\n") if line.strip()]
    if not lines:
        raise UserError(f"{setting} {path}: has no prompt in it; write one a line")
    return lines
