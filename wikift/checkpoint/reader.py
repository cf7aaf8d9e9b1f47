"""A checkpoint: one safetensors file of fragments per rank, and a manifest that makes it complete.

    RUN/checkpoints/step-00000500/rank-00000.safetensors   1-D ranges, keyed NAME|STATE|START
    RUN/checkpoints/step-00000500/manifest.json            written last: step, settings, every file's size and sha256

A reader copies ranges of the files, whoever wrote them, so any number of ranks and any engine can resume from it. How
checkpoints are written: writer.py.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from wikift.base import tensorfile
from wikift.base.errors import EnvironmentFault, UserError
from wikift.base.files import read_range, sha256_of
from wikift.base.folders import list_checkpoints
from wikift.checkpoint.fragment import OPTIMIZER, SCALARS, STATES

if TYPE_CHECKING:  # consolidation moves bytes; it does not wait a second and a half for torch
    from torch import Tensor

    from wikift.base.world import World

FORMAT = "wikift-checkpoint-1"


class StoredRange(NamedTuple):
    """Where elements [start, stop) of a flattened parameter or moment are: `offset` bytes into `file` of the folder."""

    name: str
    state: str
    start: int
    stop: int
    file: str
    offset: int


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint: a FragmentReader. `manifest`: step, tokens, eval_loss, model_config, parameters ..."""

    path: Path
    manifest: dict[str, Any]
    ranges: list[StoredRange] = field(repr=False)

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's shape, by Hugging Face name, in the model's order."""
        return {name: tuple(shape) for name, shape in self.manifest["parameters"].items()}

    @functools.cached_property
    def _by_tensor(self) -> dict[tuple[str, str], list[StoredRange]]:
        tensors: dict[tuple[str, str], list[StoredRange]] = {}
        for stored in self.ranges:
            tensors.setdefault((stored.name, stored.state), []).append(stored)
        return tensors

    def read(self, name: str, state: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a flattened tensor, 1-D fp32 on the CPU; reads only their bytes."""
        import torch

        values = torch.empty(stop - start, dtype=torch.float32)
        self.read_into(name, state, start, memoryview(values.view(torch.uint8).numpy().data))
        return values

    def read_into(self, name: str, state: str, start: int, into: memoryview) -> None:
        """Fill `into` (bytes) with the fp32 elements from `start` on, as `read` does; needs no torch."""
        stop = start + len(into) // 4
        filled = 0
        for stored in self._by_tensor[name, state]:
            low, high = max(start, stored.start), min(stop, stored.stop)
            if low >= high:
                continue
            target = into[4 * (low - start) : 4 * (high - start)]
            try:
                read_range(self.path / stored.file, stored.offset + 4 * (low - stored.start), target)
            except OSError as error:
                raise EnvironmentFault(f"{error}; the checkpoint {self.path} is damaged") from None
            filled += high - low
        assert filled == stop - start, (name, state, start, stop, filled)

    def verify(self, file: str) -> None:
        """Read every byte of one of the manifest's files. Raises UserError where it is not as it was written."""
        if sha256_of(self.path / file) != self.manifest["files"][file]["sha256"]:
            raise UserError(f"{self.path / file}: its content has changed since it was written (sha256 differs)")


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a complete checkpoint: its manifest, its files' sizes and headers; the rest `Checkpoint.verify` reads.

    Raises UserError naming what is missing or damaged.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: is not a checkpoint (no manifest.json); name OUTPUT_DIR/checkpoints/step-..."
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: manifest.json cannot be read ({error}); use an older checkpoint") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path}: is not a checkpoint of this version of wikift (format {FORMAT})")
    ranges: list[StoredRange] = []
    for name, facts in manifest["files"].items():
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size != facts["bytes"]:
            problem = "is missing" if size is None else f"has {size} bytes"
            raise UserError(f"{file}: {problem}, the manifest says {facts['bytes']}")
        try:
            for key, (_, shape, offset) in tensorfile.read_header(file)[0].items():
                ranges.append(stored_range(key, shape[0], name, offset))
        except ValueError as error:
            raise UserError(f"{file}: its content has changed since it was written ({error})") from None
    return Checkpoint(path, manifest, ranges)


def stored_range(key: str, count: int, file: str, offset: int = 0) -> StoredRange:
    """The range of `count` elements whose name in a file is `key`."""
    name, state, start = key.split("|")
    return StoredRange(name, state, int(start), int(start) + count, file, offset)


def check_complete(ranges: list[StoredRange], manifest: dict[str, Any]) -> None:
    """Raises ValueError unless `ranges` are every element that `manifest` promises, once, and nothing else."""
    states = STATES[:1] if manifest.get("weights_alone") else STATES
    wanted = {(name, state): math.prod(shape) for name, shape in manifest["parameters"].items() for state in states}
    if not manifest.get("weights_alone"):
        wanted |= {(OPTIMIZER, number): 1 for number in SCALARS}
    reached = dict.fromkeys(wanted, 0)
    for name, state, start, stop, *_ in sorted(ranges):
        if reached.get((name, state)) != start:
            raise ValueError(f"{name} {state}: unknown, or a gap or an overlap at element {start}")
        reached[name, state] = stop
    if wrong := [key for key, count in wanted.items() if reached[key] != count]:
        raise ValueError(f"{' '.join(wrong[0])}: has {reached[wrong[0]]} elements of {wanted[wrong[0]]}")


def open_sound(path: Path, world: World) -> Checkpoint:
    """Open a checkpoint whose every byte is as written; collective.

    Rank 0 reads the manifest and the headers and tells the others, then each rank reads its share of the files: the
    folder is opened by name, since a network disk may show ranks different listings. Raises UserError on every rank.
    """
    opened, problem = None, ""
    if world.rank == 0:
        try:
            opened = open_checkpoint(path)
        except (UserError, OSError) as error:
            problem = str(error)
    if problem := world.shared(problem):
        raise UserError(problem)
    manifest, ranges = world.shared([opened.manifest, opened.ranges] if opened is not None else None)
    checkpoint = Checkpoint(path, manifest, [StoredRange(*stored) for stored in ranges])
    try:
        for name in sorted(manifest["files"])[world.rank :: world.size]:
            checkpoint.verify(name)
    except (UserError, OSError) as error:
        problem = str(error)
    if number := world.highest(world.rank + 1 if problem else 0):
        raise UserError(world.shared(problem, source=number - 1))
    return checkpoint


def newest_sound(run: Path, world: World) -> Checkpoint | None:
    """The newest checkpoint whose every byte is as written, in rank 0's listing; collective.

    A damaged one is reported and skipped; raises UserError where all are damaged.
    """
    names = world.shared([path.name for path in list_checkpoints(run)])
    for name in reversed(names):
        try:
            return open_sound(run / "checkpoints" / name, world)
        except UserError as error:
            if world.rank == 0:
                print(f"wikift: skipping a damaged checkpoint: {error}", file=sys.stderr)
    if names:
        raise UserError(
            f"{run / 'checkpoints'}: every checkpoint in it is damaged; --resume never restarts and keeps them aside"
        )
    return None


def prune(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints and the one with the lowest validation loss."""
    best = best_checkpoint(run)
    for path in list_checkpoints(run)[:-keep]:
        if path != best:
            (path / "manifest.json").unlink()  # first: a reader must not see it partly deleted
            shutil.rmtree(path)


def best_checkpoint(run: Path) -> Path | None:
    """The complete checkpoint with the lowest validation loss, None where none was validated."""
    scored = []
    for path in list_checkpoints(run):
        loss = json.loads((path / "manifest.json").read_text(encoding="utf-8")).get("eval_loss")
        if loss is not None:
            scored.append((loss, path))
    return min(scored)[1] if scored else None
