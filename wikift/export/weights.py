"""A checkpoint's weights to safetensors files as transformers writes them, a megabyte at a time; needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from wikift.base.files import replace_json
from wikift.base.tensorfile import ITEM_BYTES, Entry, read_header, write_pieces
from wikift.checkpoint.reader import Checkpoint

CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
HEAD = "lm_head.weight"
_PIECE = 1 << 18  # elements read at a time: 1 MiB, which stays in a core's cache

Piece = np.ndarray[Any, np.dtype[np.float32]]


def write_weights(checkpoint: Checkpoint, folder: Path, dtype: str, shard_bytes: int) -> int:
    """Write the weights as `save_pretrained` would, in files of at most `shard_bytes`; returns the bytes of all.

    Names, order and grouping are transformers'. A tied head is omitted, the embedding stands for it.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    code = CODES[dtype]
    tied = checkpoint.manifest["model_config"].get("tie_word_embeddings", True)
    shapes = {name: shape for name, shape in checkpoint.shapes.items() if not (tied and name == HEAD)}
    entries = {name: Entry(name, code, shape) for name, shape in shapes.items()}
    buffer = np.empty(_PIECE, np.float32)

    def pieces(entry: Entry) -> Iterator[memoryview]:
        count = math.prod(entry.shape)
        for start in range(0, count, _PIECE):
            piece = buffer[: min(_PIECE, count - start)]
            checkpoint.read_into(entry.name, "weight", start, memoryview(piece.view(np.uint8).data))
            yield rounded(piece, code)

    split = split_state_dict_into_shards_factory(
        entries,
        get_storage_size=lambda entry: entry.bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    for file, names in split.filename_to_tensors.items():
        shard = sorted(entries[name] for name in names)
        write_pieces(folder / file, shard, pieces, {"format": "pt"})
        header, _ = read_header(folder / file)
        if {name: (kind, shape) for name, (kind, shape, _) in header.items()} != {e.name: e[1:] for e in shard}:
            raise OSError(f"{folder / file} does not read back as it was written")
    total = int(split.metadata["total_size"])
    if split.is_sharded:
        metadata = {"total_parameters": total // ITEM_BYTES[code], "total_size": total}
        index = {"metadata": metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        replace_json(folder / "model.safetensors.index.json", index)
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
