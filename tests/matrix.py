"""A checkpoint written by any engine on any number of ranks goes on under any other: all pairs, as a table.

    python -m tests.matrix          all pairs (about ten minutes on two cores); docs/explanation/checkpoints.md cites it

A pair is two real runs of wikift train: the writer's 8 steps with a checkpoint after the 4th, in the middle of an
epoch, and the reader's, which is given that checkpoint alone. Steps 5 to 8 and all weights and moments after step 8
are compared with the writer's where nothing changed (to the last bit), else with a single process'.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.ranks import run_ranks
from tests.tiny import arguments, curve, tiny_store, train
from wikift.base.folders import step_folder
from wikift.base.world import World
from wikift.checkpoint.fragment import STATES
from wikift.checkpoint.reader import open_sound

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-5
SAVED, LAST = 4, 8  # steps


class Place(NamedTuple):
    engine: str
    ranks: int

    def __str__(self) -> str:
        return f"{self.engine} on {self.ranks}"


SINGLE = Place("single", 1)
PLACES = (
    SINGLE,
    *(Place("ddp", ranks) for ranks in (2, 4)),
    *(Place(engine, ranks) for engine in ("fsdp", "zero1", "zero2", "zero3") for ranks in (1, 2, 4)),
)


def line(place: Place, store: Path, run: Path, **settings: Any) -> list[str]:
    """A command line of wikift train at `place`: 12 blocks a step, dropout off."""
    words: dict[str, Any] = {
        "global_batch_size": 12, "per_device_train_batch_size": 1, "max_steps": LAST, "save_steps": SAVED,
        "eval_steps": SAVED, "dropout": 0, "learning_rate": 1e-3, "adam_epsilon": 1e-6, "weight_decay": 0.1,
        "save_total_limit": 9, **settings,
    }  # fmt: skip
    if place.engine.startswith("zero"):
        words["deepspeed"] = ROOT / "ds_configs" / f"{place.engine}.json"
    else:
        words["engine"] = place.engine
    return arguments(store, run, **words)


def train_all(lines: Sequence[list[str]]) -> list[int]:
    return [train(words) for words in lines]


def write(folder: Path, places: Iterable[Place], **settings: Any) -> None:
    """Every writer's uninterrupted run, FOLDER/PLACE."""
    for place in places:
        words = line(place, folder / "store", folder / str(place), **settings)
        assert run_ranks(train_all, place.ranks, [words], timeout_seconds=300) == [[0]] * place.ranks, place


def read(folder: Path, writers: Sequence[Place], reader: Place, **settings: Any) -> Iterator[tuple[Place, float]]:
    """Go on from each writer's checkpoint; (writer, largest difference), which is 0 where not a bit differs.

    From a writer at the same place the difference is to that writer's run, else to the single process'.
    """
    lines = []
    for writer in writers:
        run = folder / f"{writer} then {reader}"
        shutil.copytree(folder / str(writer), run)
        shutil.rmtree(step_folder(run, LAST))
        lines.append(line(reader, folder / "store", run, **settings))
    done = run_ranks(train_all, reader.ranks, lines, timeout_seconds=600)
    assert done == [[0] * len(lines)] * reader.ranks
    for writer in writers:
        run = folder / f"{writer} then {reader}"
        yield writer, difference(run, folder / str(writer if writer == reader else SINGLE))
        shutil.rmtree(run)


def difference(run: Path, reference: Path) -> float:
    """The largest of losses, of weights and of moments (absolute), and of gradient norms (relative)."""
    found = []
    for got, expected in zip(curve(run)[SAVED:], curve(reference)[SAVED:], strict=True):
        assert got[0] == expected[0], "steps"
        assert got[3:5] == expected[3:5], "learning rate and tokens"
        found += [abs(got[1] - expected[1]), abs(got[2] / expected[2] - 1)]
        if expected[5] is not None:
            found.append(abs(got[5] - expected[5]))
    ours, theirs = (open_sound(step_folder(path, LAST), World()) for path in (run, reference))
    for name, shape in theirs.shapes.items():
        count = torch.Size(shape).numel()
        for state in STATES:
            gap = ours.read(name, state, 0, count) - theirs.read(name, state, 0, count)
            found.append(float(gap.abs().max()))
    return max(found)


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_store(folder / "store")
        write(folder, PLACES)
        table: dict[tuple[Place, Place], float] = {}
        for reader in PLACES:
            for writer, gap in read(folder, PLACES, reader):
                table[writer, reader] = gap
            print(reader, {str(writer): table[writer, reader] for writer in PLACES}, flush=True)
    wrong = [pair for pair, gap in table.items() if gap > (0 if pair[0] == pair[1] else TOLERANCE)]
    print(*(f"WRONG: {writer} then {reader}: {table[writer, reader]}" for writer, reader in wrong), sep="\n")
    print(f"{len(table) - len(wrong)} pairs hold, {len(wrong)} do not; largest difference {max(table.values()):.0e}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
