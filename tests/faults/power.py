"""What a power cut could break, by the order of a command's calls."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def order_problems(calls: Sequence[Sequence[str]]) -> list[str]:
    """What a power cut could break: a rename of what is not on the disk yet, or a removal before the new name is."""
    dirty: set[str] = set()  # files with content, and folders with names, that are not on the disk
    logs: set[str] = set()  # files with content that have their name already
    renamed: set[str] = set()  # folders with a new name that is not
    wrong = []
    for call, one, two in calls:
        folder = os.path.dirname(one)
        if call == "write":
            (dirty if _aside(one) else logs).add(one)
        elif call in ("create", "mkdir"):
            dirty.add(folder)
        elif call == "fsync":
            dirty.discard(one)
            logs.discard(one)
            renamed.discard(one)
        elif call == "rename":
            unsynced = [*logs, *(path for path in dirty if path == one or path.startswith(one + "/"))]
            if unsynced and not _aside(two):
                wrong.append(f"order: {one} gets its name before {unsynced} is on the disk")
            dirty |= {folder, os.path.dirname(two)}
            if ".partial" in os.path.basename(one):
                renamed.add(os.path.dirname(two))
        elif call in ("unlink", "rmdir"):
            dirty.add(folder)
        if call in ("unlink", "rmdir", "rename") and not _aside(one) and (call != "rename" or _aside(two)) and renamed:
            wrong.append(f"order: {one} is removed before the names in {renamed} are on the disk")
    return wrong


def _aside(path: str) -> bool:
    return any(part.endswith((".partial", ".lock")) or part == "stacks" for part in Path(path).parts)
