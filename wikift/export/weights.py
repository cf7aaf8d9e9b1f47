"""Weights to safetensors files as transformers writes them, a megabyte at a time; needs numpy, not torch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wikift.base.tensorfile import ITEM_BYTES, Entry, read_header, write_pieces
from wikift.checkpoint.reader import Checkpoint

CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
HEAD = "lm_head.weight"
PIECE = 1 << 18  # elements read at a time: 1 MiB, which stays in a core's cache

Piece = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Weights:
    """A model's weights: shapes by Hugging Face name in the model's order, and each one's elements.

    `pieces(name)` gives the flattened tensor as 1-D fp32 arrays in order, each valid until the next is asked for.
    """

    shapes: dict[str, tuple[int, ...]]
    pieces: Callable[[str], Iterator[Piece]]


def checkpoint_weights(checkpoint: Checkpoint) -> Weights:
    """The weights of a checkpoint of wikift's; holds one piece in memory."""
    buffer = np.empty(PIECE, np.float32)

    def pieces(name: str) -> Iterator[Piece]:
        count = math.prod(checkpoint.shapes[name])
        for start in range(0, count, PIECE):
            piece = buffer[: min(PIECE, count - start)]
            checkpoint.read_into(name, "weight", start, memoryview(piece.view(np.uint8).data))
            yield piece

    return Weights(checkpoint.shapes, pieces)


def write_weights(weights: Weights, folder: Path, dtype: str, shard_bytes: int, *, tied: bool) -> int:
    """Write the weights as `save_pretrained` would, in files of at most `shard_bytes`; gives the bytes of all.

    Names, order and grouping are transformers': a tensor larger than a file has one of its own, the others fill files
    in the model's order, and within a file they lie by name. The tied head is left out, the embedding stands for it.
    """
    code = CODES[dtype]
    entries = [Entry(name, code, shape) for name, shape in weights.shapes.items() if not (tied and name == HEAD)]

    def pieces(entry: Entry) -> Iterator[memoryview]:
        return (rounded(piece, code) for piece in weights.pieces(entry.name))

    groups = _shards(entries, shard_bytes)
    names = ["model.safetensors"]
    if len(groups) > 1:
        names = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    places: dict[str, str] = {}
    for name, group in zip(names, groups, strict=True):
        group = sorted(group)
        size = write_pieces(folder / name, group, pieces, {"format": "pt"})
        found, _ = read_header(folder / name)
        if {n: (d, s) for n, (d, s, _) in found.items()} != {e.name: (e.dtype, e.shape) for e in group}:
            raise OSError(f"{folder / name} does not read back as it was written")
        assert size == (folder / name).stat().st_size
        places |= {entry.name: name for entry in group}
    total = sum(entry.bytes for entry in entries)
    if len(groups) > 1:
        metadata = {"total_parameters": total // ITEM_BYTES[code], "total_size": total}
        index = {"metadata": metadata, "weight_map": dict(sorted(places.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def rounded(piece: Piece, code: str) -> memoryview:
    """The bytes of fp32 numbers in F32, F16 or BF16, rounded to the nearest, halfway to even, as torch does."""
    if code == "F16":
        with np.errstate(over="ignore"):
            piece = piece.astype(np.float16)
    elif code == "BF16":  # numpy has none: the upper half of fp32's bits
        bits = piece.view(np.uint32)
        upper = ((bits + (0x7FFF + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)).astype(np.uint16)
        piece = np.where(np.isnan(piece), np.uint16(0x7FC0), upper)
    return memoryview(piece.view(np.uint8).data)


def _shards(entries: Sequence[Entry], limit: int) -> list[list[Entry]]:
    """Entries dealt out to files: in order, a new file where the next would exceed `limit` bytes."""
    groups: list[list[Entry]] = []
    current: list[Entry] = []
    for entry in entries:
        if entry.bytes > limit:
            groups.append([entry])
            continue
        if current and sum(e.bytes for e in current) + entry.bytes > limit:
            groups.append(current)
            current = []
        current.append(entry)
    return [*groups, current] if current else groups
