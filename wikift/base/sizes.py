"""Sizes of files in people's words. Imports nothing heavy."""

from __future__ import annotations

import re

from wikift.base.errors import UserError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """`5GB`, `500 MB`, `1GiB` or a number of bytes -> bytes. Raises UserError otherwise."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]I?B)?", text.strip().upper())
    size = int(float(match[1]) * _UNITS.get(match[2] or "", 0)) if match else 0
    if size < 1:
        raise UserError(f"--max-shard-size {text}: must be a number and KB, MB, GB, TB, KiB, MiB or GiB; try 5GB")
    return size


def show_bytes(count: int) -> str:
    """5.00 GB, 12.3 MB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
