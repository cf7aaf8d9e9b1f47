"""`make soak`: points of all cases, then signals at random moments; writes docs/explanation/reliability.md.

python -m tests.faults.soak --seconds 3600 --seed 1
"""

from __future__ import annotations

import argparse
import datetime
import functools
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
from tests.faults.checks import losses, names, orphans
from tests.faults.driver import HUNG, KINDS, Blow, Ended, load, preloaded, run, torchrun
from tests.faults.points import CASES, report, strike_all
from tests.tiny import tiny_store

PAGE = Path(__file__).resolve().parents[2] / "docs" / "explanation" / "reliability.md"
PLACES = [matrix.SINGLE, *(matrix.Place(engine, 2) for engine in ("ddp", "fsdp", "zero1", "zero2", "zero3"))]
OTHER = [matrix.Place(engine, ranks) for engine in ("ddp", "fsdp", "zero2", "zero3") for ranks in (2, 3, 4)]
SIGNALS = ("SIGKILL", "SIGTERM", "SIGSTOP", "frozen")
TO_LAUNCHER = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
BEGINNINGS = (".", "run", "run/metrics.jsonl")  # a launcher's ranks start, set up, train
HANG_SECONDS = 6
SURVIVE_SECONDS = 90.0  # ranks notice the end of their launcher, and save; or could not meet


class Nights:
    """Runs of eight steps that are struck again and again, and the one of each place that nothing struck."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.root, self.random = folder, folder / "root", random.Random(seed)
        self.plain: dict[matrix.Place, Path] = {}
        self.root.mkdir(parents=True)
        self.store = tiny_store(folder / "store")

    def line(self, place: matrix.Place, **settings: Any) -> list[str]:
        words = {"save_steps": 2, "save_total_limit": 2, **settings}
        return ["train", *matrix.line(place, self.store, Path("ROOT/run"), **words)]

    def reference(self, place: matrix.Place) -> Path:
        if place not in self.plain:
            root = self.plain[place] = self.folder / str(place)
            root.mkdir()
            ended = run(root, self.line(place), place.ranks)
            assert ended.good, ended
        return self.plain[place]

    def night(self, places: Sequence[matrix.Place]) -> tuple[Counter[str], list[str]]:
        """A run struck once at each of two to four of `places`: the strikes, and what is wrong at its end."""
        _empty(self.root)
        wrong, strikes = list[str](), Counter[str]()
        drawn = [self.random.choice(places) for _ in range(self.random.randint(2, 4))]
        for place in drawn:
            kind = self.random.choice(SIGNALS[: 3 if place.ranks == 1 else 4])
            rank = self.random.choice([None, *range(place.ranks)])
            blow = Blow(self.random.uniform(0, 1.5), signal.Signals[kind], rank) if kind != "frozen" else None
            blow = blow or Blow(
                self.random.uniform(0, 0.5), signal.SIGSTOP, self.random.randrange(place.ranks), "run/stacks", True
            )
            shutil.rmtree(self.root / "run" / "stacks", ignore_errors=True)  # of a run that was killed
            ended = run(self.root, self.line(place, hang_timeout=HANG_SECONDS), place.ranks, blow=blow)
            strikes[kind] += ended.struck
            wrong += [f"{text}: {place} {blow} {ended.codes} {ended.output}" for text in _wrong_end(kind, ended)]
            wrong += [f"process: {place} {blow}"] * orphans()
        return strikes, wrong + self.at_the_end(drawn)

    def launched(self) -> tuple[Counter[str], list[str]]:
        """A run whose launcher, torchrun, is struck."""
        _empty(self.root)
        place, number = self.random.choice(PLACES[1:]), self.random.choice(TO_LAUNCHER)
        blow = Blow(self.random.uniform(0, 2), number, after=self.random.choice(BEGINNINGS))
        ended = torchrun(self.root, self.line(place), place.ranks, blow)
        wrong = [f"hang: torchrun {place} {blow} {ended.output}"] * (HUNG in ended.codes)
        wrong += [f"process: torchrun {place} {blow} {ended.output}"] * orphans(SURVIVE_SECONDS)
        return Counter({number.name: int(ended.struck)}), wrong + self.at_the_end([place])

    def at_the_end(self, places: Sequence[matrix.Place]) -> list[str]:
        """What is wrong when the command at the last of `places` has ended the run."""
        last, wrong = places[-1], list[str]()
        ended = run(self.root, self.line(last), last.ranks)
        if not ended.good:
            return [f"message: {places} {ended.codes} {ended.output}"]
        if len(set(places)) == 1:
            wrong += [] if bits(self.root) == bits(self.reference(last)) else [f"bits: {places}"]
        elif (gap := matrix.difference(self.root / "run", self.reference(matrix.SINGLE) / "run")) > matrix.TOLERANCE:
            wrong.append(f"bits: {places} {gap}")
        spare = ("partial", "lock", ".old")
        left = [name for name in names(self.root) if any(text in name for text in spare)]
        return wrong + [f"left: {left}"] * bool(left)


def _empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def _wrong_end(kind: str, ended: Ended) -> list[str]:
    """What is wrong with the end of a run that was struck."""
    codes, killed = set(ended.codes), {-signal.SIGKILL} if -signal.SIGTERM in ended.codes else set[int]()
    expected = {
        "SIGSTOP": {0}, "SIGTERM": {0, 1, 75, 143, -signal.SIGTERM, *killed}, "frozen": {0, 1, -signal.SIGKILL},
    }  # fmt: skip
    wrong = ["hang"] * (HUNG in codes) + ["message"] * bool(codes - expected.get(kind, codes))
    told = any(text in ended.output for text in ("shows no sign of life", "s for rank"))
    return wrong + ["message"] * (kind == "frozen" and 1 in codes and not told)


def bits(root: Path) -> tuple[Any, ...]:
    """The losses of a run, and its last weights and moments."""
    files = sorted(root.glob(f"run/checkpoints/step-{matrix.LAST:08d}/*.safetensors"))
    return losses(root / "run" / "metrics.jsonl"), [file.read_bytes() for file in files]


def nights(folder: Path, seed: int, seconds: float) -> dict[str, dict[str, Any]]:
    """Rows of the table: each engine by itself, one engine after another on other numbers of ranks, the launcher."""
    bench, end = Nights(folder, seed), time.monotonic() + seconds
    kinds = {f"signals: {place}": functools.partial(bench.night, [place]) for place in PLACES}
    kinds |= {"signals: another engine each time": functools.partial(bench.night, OTHER)}
    kinds |= {"signals: torchrun, any engine on 2": bench.launched}
    rows: dict[str, dict[str, Any]] = {name: {"kinds": Counter(), "problems": []} for name in kinds}
    spent = dict.fromkeys(kinds, 0.0)
    while (began := time.monotonic()) < end:
        name = min(spent, key=spent.__getitem__)
        strikes, wrong = kinds[name]()
        rows[name]["kinds"].update(strikes)
        report(rows, name, wrong)
        spent[name] += time.monotonic() - began
    return rows


HEAD = """\
# Reliability

What survives a kill, a full disk, a disk that fails? The page is written by `make soak` (tests/faults), never by
hand.

Points: a preloaded library counts the calls that change files below a folder (open for writing, write, fsync, rename,
unlink, mkdir, rmdir ...), or read them, and lets one of them fail, or be the last of the process; a write that is
struck arrives by half, and a disk that is full stays full. Each fault is followed by the same command. Signals:
SIGKILL, SIGTERM, or SIGSTOP and SIGCONT, to one rank or to all of them at a random moment, or a rank that stays frozen,
two to four times a run, before the same command (or the one of another engine on another number of ranks) ends the run;
and SIGKILL, SIGTERM or SIGINT to a real torchrun, which no rank may survive.

After every fault three things are checked. Right after it each store, checkpoint, model and export is the old one or
the new one to the last byte, never half, and no older one has gone before the newer was there. After the same command
the losses, weights, moments and exports are those of a command that nothing struck, to the last bit (after a change
of engine: within 1e-5), and nothing is left over: no file, nothing in `/dev/shm`, no process.

"""


def table(rows: dict[str, dict[str, Any]], seed: int, seconds: float) -> str:
    """The page."""
    columns = [*KINDS[1:], *SIGNALS, "SIGINT"]
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
        rows |= nights(folder / "nights", asked.seed, 0.3 * asked.seconds)
    page = table(rows, asked.seed, time.monotonic() - began)
    asked.page.write_text(page, encoding="utf-8")
    print(page)
    return 1 if any(row["problems"] for row in rows.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
