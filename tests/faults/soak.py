"""`make soak`: points of all cases, then signals at random moments; writes docs/explanation/reliability.md.

python -m tests.faults.soak --seconds 3600 --seed 1
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests import matrix
from tests.faults.points import (
    CASES,
    HUNG,
    KINDS,
    Blow,
    load,
    losses,
    names,
    orphans,
    preloaded,
    report,
    run,
    strike_all,
)
from tests.tiny import tiny_store

PAGE = Path(__file__).resolve().parents[2] / "docs" / "explanation" / "reliability.md"
PLACES = [matrix.SINGLE, *(matrix.Place(engine, 2) for engine in ("ddp", "fsdp", "zero1", "zero2", "zero3"))]
OTHER = [matrix.Place(engine, ranks) for engine in ("ddp", "fsdp", "zero2", "zero3") for ranks in (2, 3, 4)]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP)


class Nights:
    """Runs of eight steps that are struck again and again, and the one of each place that nothing struck."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.plain: dict[matrix.Place, Path] = {}
        (folder / "root").mkdir()
        self.store = tiny_store(folder / "store")

    def line(self, place: matrix.Place) -> list[str]:
        return ["train", *matrix.line(place, self.store, Path("ROOT/run"), save_steps=2, save_total_limit=2)]

    def reference(self, place: matrix.Place) -> Path:
        if place not in self.plain:
            root = self.plain[place] = self.folder / str(place)
            root.mkdir()
            codes, output, _ = run(root, self.line(place), place.ranks)
            assert codes == [0] * place.ranks, output
        return self.plain[place]

    def night(self, places: Sequence[matrix.Place]) -> tuple[Counter[str], list[str]]:
        """A run struck once at each of `places`, then at the last one to its end: the strikes, and what is wrong."""
        root, wrong, strikes = self.folder / "root", list[str](), Counter[str]()
        shutil.rmtree(root)
        root.mkdir()
        for place in places:
            number = self.random.choice(SIGNALS)
            blow = Blow(self.random.uniform(0, 1.5), number, self.random.choice([None, *range(place.ranks)]))
            began = time.monotonic()
            codes, output, _ = run(root, self.line(place), place.ranks, blow=blow)
            strikes[number.name] += time.monotonic() - began > blow.seconds
            wrong += self._ended(f"{place} {blow}", number, codes, output)
        last = places[-1]
        codes, output, _ = run(root, self.line(last), last.ranks)
        if codes != [0] * last.ranks:
            return strikes, [*wrong, f"message: {places} {codes} {output}"]
        if len(set(places)) == 1:
            wrong += [] if bits(root) == bits(self.reference(last)) else [f"bits: {places}"]
        elif (gap := matrix.difference(root / "run", self.reference(matrix.SINGLE) / "run")) > matrix.TOLERANCE:
            wrong.append(f"bits: {places} {gap}")
        left = [name for name in names(root) if any(text in name for text in ("partial", "lock", "stacks", ".old"))]
        return strikes, wrong + [f"left: {left}"] * bool(left)

    def _ended(self, what: str, number: int, codes: list[int], output: str) -> list[str]:
        """What is wrong with the end of a run that was struck."""
        wrong = [f"hang: {what}: {output}"] if HUNG in codes else []
        if number == signal.SIGSTOP and set(codes) != {0}:
            wrong.append(f"message: {what}: {codes} {output}")
        killed = {-signal.SIGKILL} if -signal.SIGTERM in codes else set[int]()
        if number == signal.SIGTERM and set(codes) - {0, 1, 75, 143, -signal.SIGTERM, *killed}:
            wrong.append(f"message: {what}: {codes} {output}")
        return wrong + [f"process: {what}"] * orphans()


def bits(root: Path) -> tuple[Any, ...]:
    """The losses of a run, and its last weights and moments."""
    files = sorted(root.glob(f"run/checkpoints/step-{matrix.LAST:08d}/*.safetensors"))
    return losses(root / "run" / "metrics.jsonl"), [file.read_bytes() for file in files]


def nights(folder: Path, seed: int, seconds: float) -> dict[str, dict[str, Any]]:
    """Rows of the table: each engine by itself, and one engine after another on other numbers of ranks."""
    bench, end = Nights(folder, seed), time.monotonic() + seconds
    kinds = {f"signals: {place}": [place] for place in PLACES} | {"signals: another engine each time": OTHER}
    rows: dict[str, dict[str, Any]] = {name: {"kinds": Counter(), "problems": []} for name in kinds}
    for name, places in itertools.cycle(kinds.items()):
        if time.monotonic() > end:
            return rows
        count = bench.random.randint(2, 4)
        strikes, wrong = bench.night([bench.random.choice(places) for _ in range(count)])
        rows[name]["kinds"].update(strikes)
        report(rows, name, wrong)
    return rows


HEAD = """\
# Reliability

What survives a kill, a full disk, a disk that fails? The page is written by `make soak` (tests/faults), never by
hand.

Points: a preloaded library counts the calls that change files below a folder (open for writing, write, fsync, rename,
unlink, mkdir, rmdir ...), or read them, and lets one of them fail, or be the last of the process; a write that is
struck arrives by half, and a disk that is full stays full. Each fault is followed by the same command. Signals:
SIGKILL, SIGTERM, or SIGSTOP and SIGCONT, to one rank or to all of them at a random moment, two to four times a run,
before the same command (or the one of another engine on another number of ranks) ends the run.

After every fault three things are checked. Right after it each store, checkpoint, model and export is the old one or
the new one to the last byte, never half, and no older one has gone before the newer was there. After the same command
the losses, weights, moments and exports are those of a command that nothing struck, to the last bit (after a change
of engine: within 1e-5), and nothing is left over: no file, nothing in `/dev/shm`, no process.

"""


def table(rows: dict[str, dict[str, Any]], seed: int, seconds: float) -> str:
    """The page."""
    columns = [*KINDS[1:], *(number.name for number in SIGNALS)]
    lines = [f"| what is struck | points | {' | '.join(columns)} | problems |", "|---|" + "---:|" * (len(columns) + 2)]
    for name, row in rows.items():
        numbers = [str(row["kinds"].get(kind, "")) for kind in columns]
        lines.append(f"| {name} | {row.get('points', '')} | {' | '.join(numbers)} | {len(row['problems'])} |")
    faults = sum(sum(row["kinds"].values()) for row in rows.values())
    counts = Counter(text.split(":")[0] for row in rows.values() for text in row["problems"])
    about = {
        "Faults": f"{faults:,}", "Differing bits": counts["bits"], "Half written": counts["half"],
        "Hangs": counts["hang"],
        "Processes left": counts["process"], "Files left": counts["left"], "Wrong ends": counts["message"],
        "Seed": seed, "Date": datetime.date.today(), "Time": f"{seconds / 60:.0f} minutes",
        "Machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }  # fmt: skip
    return HEAD + "\n".join([*(f"- {name}: {value}" for name, value in about.items()), "", *lines]) + "\n"


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--page", type=Path, default=PAGE)
    asked = parser.parse_args(words)
    preloaded("tests.faults.soak", words)
    load()
    print(f"seed {asked.seed}", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        rows = strike_all(list(CASES.values()), folder, asked.seed, 0.7 * asked.seconds)
        (folder / "nights").mkdir()
        rows |= nights(folder / "nights", asked.seed, 0.3 * asked.seconds)
    page = table(rows, asked.seed, time.monotonic() - began)
    asked.page.write_text(page, encoding="utf-8")
    print(page)
    return 1 if any(row["problems"] for row in rows.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
