"""A checkpoint's weights to safetensors files as transformers writes them, a megabyte at a time; needs no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wikift.base.tensorfile import ITEM_BYTES, Entry, read_header, write_pieces
from wikift.checkpoint.reader import Checkpoint

CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
HEAD = "lm_head.weight"
_PIECE = 1 << 18  # elements read at a time: 1 MiB, which stays in a core's cache

Piece = np.ndarray[Any, np.dtype[np.float32]]


def write_weights(checkpoint: Checkpoint, folder: Path, dtype: str, shard_bytes: int) -> int:
    """Write the weights as `save_pretrained` would, in files of at most `shard_bytes`; returns the bytes of all.

    Names, order and grouping are transformers': a tensor larger than a file has one of its own, the others fill files
    in the model's order, and are sorted by name within a file. A tied head is omitted, the embedding stands for it.
    """
    code = CODES[dtype]
    tied = checkpoint.manifest["model_config"].get("tie_word_embeddings", True)
    entries = [Entry(name, code, shape) for name, shape in checkpoint.shapes.items() if not (tied and name == HEAD)]
    buffer = np.empty(_PIECE, np.float32)

    def pieces(entry: Entry) -> Iterator[memoryview]:
        count = math.prod(entry.shape)
        for start in range(0, count, _PIECE):
            piece = buffer[: min(_PIECE, count - start)]
            checkpoint.read_into(entry.name, "weight", start, memoryview(piece.view(np.uint8).data))
            yield rounded(piece, code)

    shards = _shards(entries, shard_bytes)
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    weight_map: dict[str, str] = {}
    for file, shard in zip(files, shards, strict=True):
        write_pieces(folder / file, sorted(shard), pieces, {"format": "pt"})
        header, _ = read_header(folder / file)
        if {name: (kind, shape) for name, (kind, shape, _) in header.items()} != {e.name: e[1:] for e in shard}:
            raise OSError(f"{folder / file} does not read back as it was written")
        weight_map |= {entry.name: file for entry in shard}
    total = sum(entry.bytes for entry in entries)
    if len(shards) > 1:
        metadata = {"total_parameters": total // ITEM_BYTES[code], "total_size": total}
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
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
    """The entries of each file: in order, a new file where the next entry would exceed `limit` bytes."""
    shards: list[list[Entry]] = []
    current: list[Entry] = []
    for entry in entries:
        if entry.bytes > limit:
            shards.append([entry])
            continue
        if current and sum(e.bytes for e in current) + entry.bytes > limit:
            shards.append(current)
            current = []
        current.append(entry)
    return [*shards, current] if current else shards
