"""A checkpoint's weights to safetensors files as transformers writes them, tensor by tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from wikift.checkpoint import Checkpoint
from wikift.tensorfile import DTYPES, Entry, read_header, write_tensors

_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_HEAD = "lm_head.weight"
_PIECE = 1 << 18  # elements read at a time


def write_weights(checkpoint: Checkpoint, folder: Path, dtype: str, shard_bytes: int) -> int:
    """Write the weights as `save_pretrained` would, in files of at most `shard_bytes`; gives the bytes of all.

    Names, order and grouping are transformers': a tensor larger than a file has one of its own, the others fill files
    in the model's order, and within a file they lie by name. The tied head is left out, the embedding stands for it.
    """
    code = _CODES[dtype]
    tied = checkpoint.manifest["model_config"].get("tie_word_embeddings", True)
    entries = [Entry(name, code, shape) for name, shape in checkpoint.shapes.items() if not (tied and name == _HEAD)]
    read = _reader(checkpoint, entries)
    groups = _shards(entries, shard_bytes)
    names = ["model.safetensors"]
    if len(groups) > 1:
        names = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    places: dict[str, str] = {}
    for name, group in zip(names, groups, strict=True):
        group = sorted(group)
        size, _ = write_tensors(folder / name, group, read, {"format": "pt"})
        found, _ = read_header(folder / name)
        if {n: (d, s) for n, (d, s, _) in found.items()} != {e.name: (e.dtype, e.shape) for e in group}:
            raise OSError(f"{folder / name} does not read back as it was written")
        assert size == (folder / name).stat().st_size
        places |= {entry.name: name for entry in group}
    total = sum(entry.bytes for entry in entries)
    if len(groups) > 1:
        metadata = {"total_parameters": total // DTYPES[code].itemsize, "total_size": total}
        index = {"metadata": metadata, "weight_map": dict(sorted(places.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def _reader(checkpoint: Checkpoint, entries: Sequence[Entry]) -> Callable[[str], Tensor]:
    """Fetches a weight by name into one buffer that all of them share: valid until the next one is fetched."""
    counts = {entry.name: math.prod(entry.shape) for entry in entries}
    buffer = torch.empty(max(counts.values()), dtype=DTYPES[entries[0].dtype])

    def read(name: str) -> Tensor:
        flat = buffer[: counts[name]]
        for start in range(0, counts[name], _PIECE):
            stop = min(start + _PIECE, counts[name])
            flat[start:stop] = checkpoint.read(name, "weight", start, stop)
        return flat.view(checkpoint.shapes[name])

    return read


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
