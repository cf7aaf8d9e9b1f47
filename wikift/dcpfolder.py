"""torch.distributed.checkpoint's folders, read without a process group: any tensor, a chunk at a time.

FOLDER/.metadata          a pickle: every tensor's shape and chunks, and where each chunk lies
FOLDER/__0_0.distcp       chunks, each as torch.save wrote it
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from wikift.base.errors import UserError
from wikift.export.weights import PIECE, Piece, Weights
from wikift.standin import damaged, load_pickle

_ALLOWED = ("torch.", "pathlib.")


class _Chunk(NamedTuple):
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    start: int  # bytes
    length: int  # bytes


def is_dcp_folder(folder: Path) -> bool:
    return (folder / ".metadata").is_file()


def open_dcp(folder: Path) -> Weights:
    """All tensors by the names that they were saved under. Raises UserError where the metadata cannot be read.

    `pieces` raises UserError for a tensor that isn't cut by rows or that is damaged; holds one chunk and its bytes.
    """
    metadata = load_pickle(folder / ".metadata", _ALLOWED)
    try:
        chunks: dict[str, list[_Chunk]] = {}
        shapes = {
            name: tuple(facts.size) for name, facts in metadata.state_dict_metadata.items() if hasattr(facts, "size")
        }
        for index, place in metadata.storage_data.items():
            if index.fqn not in shapes:
                continue
            offsets = tuple(index.offset or ())
            sizes = [
                tuple(c.sizes) for c in metadata.state_dict_metadata[index.fqn].chunks if tuple(c.offsets) == offsets
            ]
            if getattr(place, "transform_descriptors", None):
                raise UserError(f"{folder}: is compressed or in another format than torch.save's; save it without that")
            file = folder / place.relative_path
            if Path(place.relative_path).name != place.relative_path:
                raise ValueError(f"a file outside of it, {place.relative_path}")
            chunk = _Chunk(offsets, sizes[0], file, int(place.offset), int(place.length))
            chunks.setdefault(index.fqn, []).append(chunk)
    except (AttributeError, TypeError, ValueError, KeyError, IndexError) as error:
        raise damaged(folder / ".metadata", f"not what torch writes, {error}") from None

    def pieces(name: str) -> Iterator[Piece]:
        done = 0  # rows
        for chunk in sorted(chunks.get(name, ())):
            if chunk.sizes[1:] != shapes[name][1:]:
                raise UserError(
                    f"{folder}: {name} is cut by columns; only tensors cut by rows are read, as FSDP cuts them"
                )
            if not math.prod(chunk.sizes):
                continue
            if chunk.offsets[:1] not in ((done,), ()):
                break
            flat = _load(chunk).reshape(-1)
            for start in range(0, flat.numel(), PIECE):
                yield flat[start : start + PIECE].float().numpy()
            done += chunk.sizes[0] if chunk.sizes else 0
            del flat
        if shapes[name] and done != shapes[name][0]:
            raise damaged(folder, f"{name} has {done} of {shapes[name][0]} rows")

    return Weights(shapes, pieces)


def _load(chunk: _Chunk) -> Any:
    import torch

    try:
        with open(chunk.file, "rb") as file:
            view = cast(BinaryIO, _View(file, chunk.start, chunk.length))
            tensor = torch.load(view, map_location="cpu", weights_only=True)
            if tuple(tensor.shape) != chunk.sizes:
                raise ValueError(f"{list(tensor.shape)} where {list(chunk.sizes)} was written")
            return tensor.detach()
    except FileNotFoundError:
        raise UserError(f"{chunk.file}: is missing; the checkpoint is not whole") from None
    except Exception as error:  # a torn zip or pickle raises anything
        raise damaged(chunk.file, error) from None


class _View(io.RawIOBase):
    """Bytes [start, start + length) of an open file, as a file."""

    def __init__(self, file: io.BufferedReader, start: int, length: int) -> None:
        self.file, self.start, self.length, self.place = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.place = offset + (0, self.place, self.length)[whence]
        return self.place

    def tell(self) -> int:
        return self.place

    def readinto(self, into: Any) -> int:
        view = memoryview(into)[: max(0, self.length - self.place)]
        self.file.seek(self.start + self.place)
        count = self.file.readinto(view)
        self.place += count
        return count
