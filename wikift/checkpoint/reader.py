"""A checkpoint: one safetensors file of fragments per rank, and a manifest that makes it complete.

    RUN/checkpoints/step-00000500/rank-00000.safetensors   1-D ranges, keyed NAME|STATE|START
    RUN/checkpoints/step-00000500/manifest.json            written last: step, settings, every file's size and sha256,
                                                           and a digest of itself

A reader copies ranges of the files, whoever wrote them, so any number of ranks and any engine can resume from it. How
checkpoints are written: writer.py.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from wikift import __version__
from wikift.base import tensorfile
from wikift.base.console import print
from wikift.base.errors import EnvironmentFault, UserError, one_line
from wikift.base.files import content_of, digest, parse_object, read_range, remove, sha256_of
from wikift.base.folders import aside_of, list_checkpoints, step_folder
from wikift.checkpoint.fragment import OPTIMIZER, SCALARS, STATES

if TYPE_CHECKING:  # consolidation moves bytes; it does not wait a second and a half for torch
    from torch import Tensor

    from wikift.base.world import World

FORMAT = "wikift-checkpoint-2"


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


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint `path`. Raises UserError where it is another's, or not as it was written.

    Raises EnvironmentFault where the disk does not let it be read: it may be sound.
    """
    try:
        manifest = parse_object(content_of(path / "manifest.json"))
    except FileNotFoundError:
        raise UserError(f"{path}: is no checkpoint (no manifest.json); name OUTPUT_DIR/checkpoints/step-...") from None
    except OSError as error:
        raise EnvironmentFault(f"{path}: manifest.json cannot be read ({error.strerror}); see to the disk") from None
    except ValueError as error:
        raise UserError(f"{path}: manifest.json cannot be read ({one_line(error)}); use an older checkpoint") from None
    if (form := manifest.get("format")) != FORMAT:
        raise UserError(
            f"{path}: has format {form}, this version ({__version__}) reads {FORMAT}; resume or consolidate it with "
            "the version that wrote it, which its run's config.json names"
        )
    if manifest.get("sha256") != digest(manifest):
        raise UserError(f"{path}: manifest.json has changed since it was written; use an older checkpoint")
    if (name := step_folder(path, manifest["step"]).name) != path.absolute().name:
        raise UserError(f"{path}: is the checkpoint of step {manifest['step']}; name its folder {name}")
    return manifest


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a complete checkpoint: its manifest, its files' sizes and headers; the rest `Checkpoint.verify` reads.

    Raises UserError naming what is missing or damaged.
    """
    manifest, ranges = read_manifest(path), list[StoredRange]()
    try:
        for name, facts in manifest["files"].items():
            if Path(name).name != name:
                raise ValueError(f"its file {name} would be in another folder")
            size = (path / name).stat().st_size if (path / name).is_file() else None
            if size != facts["bytes"]:
                problem = "is missing" if size is None else f"has {size} bytes"
                raise ValueError(f"{name} {problem}, the manifest says {facts['bytes']}")
            for key, (dtype, shape, offset) in tensorfile.read_header(path / name)[0].items():
                if dtype != "F32" or len(shape) != 1:
                    raise ValueError(f"{name}: {key} is {dtype} {list(shape)}")
                ranges.append(stored_range(key, shape[0], name, offset))
        check_complete(ranges, manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is damaged ({one_line(error, 400)}); use an older checkpoint") from None
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
        except (UserError, EnvironmentFault, OSError) as error:
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
    problem = ""
    for name in reversed(world.shared([path.name for path in list_checkpoints(run)])):
        try:
            return open_sound(run / "checkpoints" / name, world)
        except UserError as error:
            problem = problem or str(error)
            if world.rank == 0:
                print(f"wikift: skipping a damaged checkpoint: {error}", file=sys.stderr)
    if problem:
        raise UserError(
            f"{run / 'checkpoints'}: no checkpoint in it can be resumed; --resume never restarts and keeps them aside. "
            f"The newest: {problem}"
        )
    return None


def prune(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints and the one with the lowest validation loss, and but links.

    One that cannot be deleted is told, and ends no run; none is where the best is not known.
    """
    try:
        best = best_checkpoint(run)
    except EnvironmentFault as fault:
        print(f"wikift: no older checkpoint is deleted: {fault}", file=sys.stderr)
        return
    for path in list_checkpoints(run)[:-keep]:
        if path != best and not path.is_symlink():
            try:
                os.rename(path, aside_of(path))  # first: a reader must not see it partly deleted
                remove(aside_of(path))
            except OSError as error:
                print(f"wikift: {path} cannot be deleted ({error.strerror})", file=sys.stderr)


def best_checkpoint(run: Path) -> Path | None:
    """The complete checkpoint with the lowest validation loss, None where none was validated.

    Raises EnvironmentFault where one cannot be read, which may be it.
    """
    scored = []
    for path in list_checkpoints(run):
        with contextlib.suppress(UserError):  # damaged: nobody resumes from it
            if (loss := read_manifest(path).get("eval_loss")) is not None:
                scored.append((loss, path))
    return min(scored)[1] if scored else None
