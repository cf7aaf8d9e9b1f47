"""What is on the disk: checksums, names and JSON that survive a power cut."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one on each line, none where it is missing; a line torn by a kill is omitted."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):  # U+2028 in a text ends no line
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict):
                    rows.append(row)
    return rows
