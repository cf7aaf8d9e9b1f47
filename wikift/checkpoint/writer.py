"""Checkpoints written while the training continues: a step waits for the copy to host memory and for nothing else.

Every rank copies its fragments into one buffer that is reused for each checkpoint (pinned where they come from a GPU),
and a thread writes and checksums them into a folder beside, and tells in a table which ranges they are. Rank 0's thread
waits for all ranks' tables, checks that every element is in them exactly once, writes the manifest and renames the
folder. Nothing in a thread is collective: the files themselves tell which rank is ready. At most one checkpoint is in
flight; a failure is known to all ranks at the next step, and the checkpoints before it stand.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wikift.base.console import print
from wikift.base.errors import EnvironmentFault, one_line
from wikift.base.files import remove, replace_json, sealed, sync
from wikift.base.folders import aside_of, list_checkpoints, step_folder
from wikift.base.tensorfile import Entry, write_pieces
from wikift.base.world import World
from wikift.checkpoint.fragment import Fragment
from wikift.checkpoint.reader import FORMAT, StoredRange, check_complete, prune, stored_range

_POLL_SECONDS = 0.05
_PIECE = 1 << 18  # elements, 1 MiB: hashed and written while it is in the cache


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was published, how long the training waited for it, and how long it took in all."""

    path: Path
    stall_seconds: float
    seconds: float


class Saver:
    """Writes a run's checkpoints and keeps the newest `keep` and the best. `aside`: while the training continues."""

    def __init__(self, run: Path, world: World, *, keep: int, aside: bool) -> None:
        self.run, self.world, self.keep, self.aside = run, world, keep, aside
        self._buffer = torch.empty(0)
        self._thread: threading.Thread | None = None
        self._given_up = threading.Event()
        self._step = 0
        self._saved: Saved | None = None
        self.fault = ""  # why this rank could not write; not collective

    def save(
        self, fragments: Iterable[Fragment], step: int, about: dict[str, Any], parameters: dict[str, list[int]]
    ) -> None:
        """Begin to write the checkpoint of `step`; collective. `about` goes into the manifest, `parameters` are shapes.

        Waits for the one before it. Raises EnvironmentFault on every rank where that, or the folder, could not be
        written; older checkpoints are untouched then.
        """
        started = time.perf_counter()
        self.finish()
        self._step = step
        if self.world.rank == 0:
            partial = aside_of(step_folder(self.run, step))
            try:
                remove(partial)
                partial.mkdir(parents=True)
            except OSError as error:
                self.fault = one_line(error)
        self._agree()
        tensors = {f"{f.name}|{f.state}|{f.start}": f.data for f in fragments if f.data.numel()}
        manifest = {"format": FORMAT, "step": step, **about, "parameters": parameters}
        if self.aside:
            tensors = self._copied(tensors)
            arguments = (tensors, manifest, started, time.perf_counter() - started)
            self._thread = threading.Thread(target=self._write, args=arguments, name="wikift-save", daemon=True)
            self._thread.start()
        else:
            self._write(tensors, manifest, started, None)
            self.finish()

    def finish(self) -> None:
        """Wait until nothing is in flight; collective. Raises EnvironmentFault on every rank where one failed."""
        if self.fault:
            self._given_up.set()
        # A rank that failed is known before the others wait for a checkpoint that cannot come
        while self._thread is not None:
            self._thread.join(_POLL_SECONDS)
            running = self._thread.is_alive()
            state = self.world.highest(2 if self.fault else int(running))
            if state == 2:
                self._given_up.set()
            if state != 1:
                self._thread = None
        self._agree()

    def abandon(self) -> None:
        """Give up what is in flight, and make the run's folder again, which has gone."""
        self._given_up.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._given_up.clear()
        self.fault = ""
        self.run.mkdir(parents=True, exist_ok=True)

    def take_saved(self) -> Saved | None:
        """On rank 0 the checkpoint that was published since this was last asked, else None."""
        saved, self._saved = self._saved, None
        return saved

    def _copied(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        on_cuda, sizes = self.world.device.type == "cuda", [data.numel() for data in tensors.values()]
        if self._buffer.numel() < sum(sizes):  # one for all: to pin memory takes long
            self._buffer = torch.empty(sum(sizes), dtype=torch.float32, pin_memory=on_cuda)
        copies = dict(zip(tensors, self._buffer[: sum(sizes)].split(sizes), strict=True))
        for key, data in tensors.items():
            copies[key].copy_(data, non_blocking=True)
        if on_cuda:
            torch.cuda.synchronize(self.world.device)
        return copies

    def _write(self, tensors: dict[str, Tensor], manifest: dict[str, Any], started: float, stall: float | None) -> None:
        """Write this rank's file and, on rank 0, publish; `stall` is None where the training waits for all of it."""
        final = step_folder(self.run, manifest["step"])
        partial = aside_of(final)
        try:
            _write_rank(tensors, partial, self.world.rank)
            if self.world.rank == 0 and self._all_written(partial):
                seconds = time.perf_counter() - started
                saved = Saved(final, seconds if stall is None else stall, seconds)
                times = {"save_stall_seconds": round(saved.stall_seconds, 4), "save_seconds": round(seconds, 4)}
                _publish(partial, final, {**manifest, **times}, self.world.size)
                prune(self.run, self.keep)
                self._saved = saved
        except OSError as error:
            shared = partial.is_dir()
            self.fault = (
                one_line(error)
                if shared
                else f"{partial} is missing: --output-dir must be on a disk that all hosts share"
            )
        except Exception as error:  # an invariant: raised by the main thread, on all ranks
            self.fault = f"{type(error).__name__}: {error}"

    def _all_written(self, partial: Path) -> bool:
        """Whether every rank has written its file; waits for them until another rank is known to have failed."""
        missing = [partial / f"rank-{rank:05d}.json" for rank in range(self.world.size)]
        while missing:
            missing = [path for path in missing if not path.exists()]
            if missing and self._given_up.wait(_POLL_SECONDS):
                return False
        return True

    def _agree(self) -> None:
        """All ranks learn whether one failed; collective. The one that did reports why."""
        if self.fault:
            print(
                f"wikift: rank {self.world.rank} could not write the checkpoint of step {self._step}: {self.fault}",
                file=sys.stderr,
            )
        if not self.world.highest(1 if self.fault else 0):
            return
        if self.world.rank == 0:
            remove(aside_of(step_folder(self.run, self._step)))
        kept = list_checkpoints(self.run)
        raise EnvironmentFault(
            f"the checkpoint of step {self._step} was not written; "
            + (f"the newest complete one is {kept[-1]}" if kept else "none is complete yet")
            + ". Free disk space (or fix the disk) and run the same command to resume"
        )


def _write_rank(tensors: dict[str, Tensor], folder: Path, rank: int) -> None:
    entries = [Entry(key, "F32", (data.numel(),)) for key, data in tensors.items()]
    name = f"rank-{rank:05d}.safetensors"
    digest = hashlib.sha256()
    size = write_pieces(folder / name, entries, lambda entry: _pieces(tensors[entry.name]), digest=digest)
    ranges = [stored_range(key, data.numel(), name) for key, data in tensors.items()]
    facts = {"files": {name: {"bytes": size, "sha256": digest.hexdigest()}}, "ranges": ranges}
    replace_json(folder / f"rank-{rank:05d}.json", facts)


def _pieces(data: Tensor) -> Iterator[memoryview]:
    for piece in data.cpu().split(_PIECE):
        yield memoryview(piece.view(torch.uint8).numpy().data)


def _publish(partial: Path, final: Path, manifest: dict[str, Any], ranks: int) -> None:
    files: dict[str, Any] = {}
    ranges: list[StoredRange] = []
    for rank in range(ranks):
        facts = partial / f"rank-{rank:05d}.json"
        written = json.loads(facts.read_text())
        files |= written["files"]
        ranges += [StoredRange(*stored) for stored in written["ranges"]]
        facts.unlink()
    check_complete(ranges, manifest)
    replace_json(partial / "manifest.json", sealed({**manifest, "files": files}))
    remove(final)  # no checkpoint: it has no manifest
    os.rename(partial, final)
    sync(final.parent)
