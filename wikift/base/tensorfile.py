"""Safetensors files written tensor by tensor: one tensor in memory at a time, the checksum taken on the way.

The format (https://github.com/huggingface/safetensors#format): eight bytes of header length, a JSON header with each
tensor's dtype, shape and byte range, then the bytes. The library's own writer wants all tensors in memory at once.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from wikift.base.files import parse_object

if TYPE_CHECKING:
    import torch

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_HEADER_BYTES = 100_000_000  # at most, as the library has it


class Entry(NamedTuple):
    """A tensor to be written: `dtype` in the format's words (F32, F16, BF16)."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def torch_dtype(code: str) -> torch.dtype:
    import torch  # here: who only moves bytes does not wait a second and a half for it

    return {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[code]


def write_pieces(
    path: Path,
    entries: Sequence[Entry],
    pieces: Callable[[Entry], Iterable[memoryview]],
    metadata: dict[str, str] | None = None,
    digest: Any = None,
) -> int:
    """Write `entries`, each as the bytes that `pieces(entry)` gives when its turn comes; gives the file's bytes.

    `digest`, a hash of hashlib's, is fed all that is written. The file is on the disk when this returns (fsync).
    Raises OSError (a full disk, say) and leaves a torn file then: write beside the place where a reader looks, and
    rename.
    """
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for entry in entries:
        span = [offset, offset + entry.bytes]
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": span}
        offset += entry.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to eight bytes
    written = 0
    with open(path, "wb", buffering=0) as file:

        def write(piece: memoryview) -> int:
            if digest is not None:
                digest.update(piece)
            left = piece
            while left:
                left = left[file.write(left) :]
            return piece.nbytes

        written += write(memoryview(len(text).to_bytes(8, "little") + text))
        for entry in entries:
            count = sum(map(write, pieces(entry)))
            assert count == entry.bytes, (entry, count)
            written += count
        os.fsync(file.fileno())
    assert written == 8 + len(text) + offset
    if path.stat().st_size != written:
        raise OSError(f"{path} is {path.stat().st_size} bytes on the disk, {written} were written")
    return written


def read_header(path: Path) -> tuple[dict[str, tuple[str, tuple[int, ...], int]], dict[str, str]]:
    """({name: (dtype, shape, absolute byte offset)}, metadata).

    Raises ValueError where the header makes no sense, or is not of all the file's bytes, each once.
    """
    size = path.stat().st_size if path.is_file() else 0  # a pipe or a device may have no end
    with open(path if size else os.devnull, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, _HEADER_BYTES):
            raise ValueError(f"{path}: header of {length} bytes in a file of {size}")
        header = parse_object(file.read(length))
    try:
        metadata = header.pop("__metadata__", {})
        tensors, spans = dict[str, tuple[str, tuple[int, ...], int]](), list[tuple[int, int]]()
        for name, entry in header.items():
            dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            if any(type(number) is not int or number < 0 for number in (*shape, start, stop)):
                raise ValueError(f"{path}: {name} is {shape} at {start} to {stop}")
            if stop - start != math.prod(shape) * ITEM_BYTES.get(dtype, 0) and dtype in ITEM_BYTES:
                raise ValueError(f"{path}: {name} is {dtype} {list(shape)} in {stop - start} bytes")
            tensors[name] = dtype, shape, 8 + length + start
            spans.append((start, stop))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the header of a safetensors file ({error!r})") from None
    ends = [0, *(stop for _, stop in sorted(spans))]
    if 8 + length + ends[-1] != size:
        raise ValueError(f"{path}: {size} bytes of {8 + length + ends[-1]}")
    if [start for start, _ in sorted(spans)] != ends[:-1]:
        raise ValueError(f"{path}: its tensors overlap, or have gaps between them")
    return tensors, metadata
