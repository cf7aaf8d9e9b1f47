"""A fault at every call that changes the disk, or reads it: what stands then, and what the same command makes of it.

python -m tests.faults.points                       every point of every case (hours on two cores)
python -m tests.faults.points --seconds 60 --seed 2 export    as many as fit, drawn with a seed, of some cases
python -m tests.faults.points export --point "..."          one, as a problem names it
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.checks import artifacts, losses, names, orphans, shared
from tests.faults.driver import HUNG, KINDS, Ended, Point, load, parsed, preloaded, run
from tests.faults.power import order_problems
from tests.tiny import arguments, tiny_store

GROWING = ("write", "create", "mkdir")  # calls that want room
TEXT = "".join(f"the {i % 97} of {i % 1009} and an end .\n" for i in range(3000))


@dataclass(frozen=True)
class Case:
    """A command line, ROOT standing for a folder, and those that make what it finds in there."""

    name: str
    line: list[str]
    ranks: int = 1
    before: tuple[list[str], ...] = ()


def _train(*more: str, engine: str = "single", **settings: Any) -> list[str]:
    words: dict[str, Any] = {"max_steps": 6, "save_steps": 2, "eval_steps": 2, "save_total_limit": 1}
    words["deepspeed" if engine.startswith("zero") else "engine"] = engine
    # the same learning rates for another length: a run resumes from the checkpoint before an unreadable one
    words |= {"global_batch_size": 4, "lr_scheduler_type": "constant"}
    return ["train", *arguments(Path("ROOT/store"), Path("ROOT/run"), **(words | settings)), *more]


_PREPARE = ["prepare", "--dataset", "ROOT/text.txt", "--tokenizer", "train:300", "--out", "ROOT/out", "--workers", "1"]


def _cases() -> Iterator[Case]:
    yield Case("prepare", _PREPARE)
    yield Case("start", _train(max_steps=2))
    for engine, ranks in (("single", 1), ("ddp", 2), ("fsdp", 2), ("zero2", 2)):
        begun = _train(engine=engine, max_steps=4, save_total_limit=9)
        yield Case(f"resume, save, prune: {engine}", _train(engine=engine), ranks, (begun,))
    kept = _train(max_steps=4, save_total_limit=9)
    older = _train(max_steps=4, save_total_limit=9, resume="ROOT/run/checkpoints/step-00000002")
    yield Case("resume an older step", older, 1, (kept,))
    export = ["consolidate", "ROOT/run"]
    yield Case("resume never", _train("--resume", "never", max_steps=2), 1, (kept, export))
    yield Case("prune", ["runs", "ROOT", "--prune", "--yes"], 1, (kept,))
    yield Case("export", export, 1, (kept,))
    yield Case("export over another", [*export, "--dtype", "bfloat16"], 1, (kept, export))


CASES = {case.name: case for case in _cases()}


class Bench:
    """The folder of a case before the command, and what the command makes of it without a fault."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.root, self.template = case, folder / "root", folder / "template"
        self.root.mkdir(parents=True)
        tiny_store(self.root / "store", train=200)
        (self.root / "text.txt").write_text(TEXT)
        for line in case.before:
            done = run(self.root, line, case.ranks if line[0] == "train" else 1)
            assert done.good, (line, done)
        shutil.copytree(self.root, self.template)
        self.old = artifacts(self.root)
        done = run(self.root, case.line, case.ranks)
        assert done.good, (case, done)
        self.calls, self.new, self.names = done.calls, artifacts(self.root), names(self.root)
        self.losses = losses(self.root / "run" / "metrics.jsonl")

    def points(self, seed: int) -> list[Point]:
        """Every fault at every call, the kinds in turns; the order is the seed's, but for all but the first and last
        of one call of a file, which come later.
        """
        ordered: dict[str, list[tuple[Any, ...]]] = {kind: [] for kind in KINDS[1:]}
        for rank, calls in enumerate(self.calls):
            counts = Counter((call, path) for call, path, _ in calls)
            for (call, path), count in counts.items():
                kinds = ["unreadable"] if call == "read" else ["kill", "broken"]
                kinds += ["full"] * (call in GROWING) + ["short"] * (call == "write")
                for kind, number in itertools.product(kinds, range(1, count + 1)):
                    point = Point(kind, rank, call, os.path.relpath(path, self.root), number)
                    drawn = random.Random(f"{seed} {point}").random()  # whatever order two threads' calls come in
                    ordered[kind].append((1 < number < count, drawn, point))
        rows = itertools.zip_longest(*(sorted(points) for points in ordered.values()))
        return [entry[-1] for row in rows for entry in row if entry]

    def fault(self, point: Point) -> tuple[bool, list[str]]:
        """Strike at `point`, then run the same command; whether it was struck, and what is wrong."""
        shutil.rmtree(self.root)
        shutil.copytree(self.template, self.root)
        before = shared()
        ended = run(self.root, self.case.line, self.case.ranks, point)
        if not ended.struck:
            return False, []
        wrong = self._after(ended, point)
        again = run(self.root, self.case.line, self.case.ranks)
        wrong += self._at_the_end(point) if again.good else [f"message: the same command {again.codes} {again.output}"]
        wrong += [f"left: in /dev/shm {left}"] if (left := shared() - before) else []
        wrong += ["process: one is left"] * orphans()
        return True, [f"{text}; --point '{point}'" for text in wrong]

    def _after(self, ended: Ended, point: Point) -> list[str]:
        """What is wrong right after a fault: all is old or new, never half, and the old goes only for the new."""
        codes, output, _, _ = ended
        wrong, here, good = list[str](), artifacts(self.root), ended.good
        killed = {-signal.SIGKILL} if point.kind == "kill" or 2 in codes else set[int]()
        if set(codes) - {0, 1, 2, *killed} or "Traceback" in output:
            wrong.append(f"{'hang' if HUNG in codes else 'message'}: {codes} {output}")
        if point.kind == "short" and not good:
            wrong.append(f"message: a short write ends it, {codes} {output}")
        if good and (missing := self.new.items() - here.items()):
            wrong.append(f"message: exit code 0, and not made {missing}")
        moved = "before-1" in here and "before-1" not in self.old
        for name in self.old.keys() | self.new.keys() | (here.keys() if point.kind != "unreadable" else set()):
            if here.get(name) not in (self.old.get(name), self.new.get(name), None if moved else ""):
                wrong.append(f"half: {name} is neither old nor new")
        steps = [[name for name in state if name.startswith(("step-", "before"))] for state in (self.old, here)]
        return wrong + ["half: no checkpoint is left"] * bool(steps[0] and not steps[1])

    def _at_the_end(self, point: Point) -> list[str]:
        """What differs from a command that nothing struck, but older checkpoints that a finished run leaves."""
        here, wrong = artifacts(self.root), list[str]()
        if differing := [name for name, content in self.new.items() if here.get(name) != content]:
            wrong.append(f"bits: differ, or missing {differing}")
        if losses(self.root / "run" / "metrics.jsonl") != self.losses:
            wrong.append("bits: losses")
        spare = ["before-2", *(name for name in self.old if "step" in name)]
        spare += ["before-1"] * (point.kind == "unreadable")  # whose later steps an older start has set aside
        left = [name for name in names(self.root) - self.names if not any(f"/{text}" in name for text in spare)]
        return wrong + [f"left: {sorted(left)}"] * bool(left)


def strike_all(cases: Sequence[Case], folder: Path, seed: int, seconds: float) -> dict[str, dict[str, Any]]:
    """As many points of `cases` as fit into `seconds`, of which each gets its share; counts and problems by case."""
    rows: dict[str, dict[str, Any]] = {}
    left: dict[str, tuple[Bench, list[Point]]] = {}
    for number, case in enumerate(cases):
        bench = Bench(case, folder / str(number))
        left[case.name] = bench, bench.points(seed)
        rows[case.name] = {"points": len(left[case.name][1]), "kinds": Counter(), "problems": []}
        for calls in bench.calls:
            report(rows, case.name, order_problems(calls))
    spent, end = dict.fromkeys(left, 0.0), time.monotonic() + seconds
    while left and (began := time.monotonic()) < end:
        name = min(left, key=spent.__getitem__)
        bench, points = left[name]
        point = points.pop(0)
        struck, problems = bench.fault(point)
        rows[name]["kinds"][point.kind] += struck
        report(rows, name, problems)
        spent[name] += time.monotonic() - began
        if not points:
            del left[name]
    return rows


def report(rows: dict[str, dict[str, Any]], name: str, problems: Sequence[str]) -> None:
    """Keep what went wrong in a row, and tell it at once."""
    rows[name]["problems"] += problems
    for text in problems:
        print(f"{name}: {text}", flush=True)


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.points")
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--point", action="append", help="this one alone, as a problem names it; several times")
    asked = parser.parse_args(words)
    preloaded("tests.faults.points", words)
    load()
    chosen = [case for name, case in CASES.items() if not asked.cases or any(text in name for text in asked.cases)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        if asked.point:
            bench = Bench(chosen[0], folder / "0")
            results = [bench.fault(parsed(text)) for text in asked.point]
            print(*(result for text in zip(asked.point, results, strict=True) for result in text), sep="\n")
            return int(any(problems or not struck for struck, problems in results))
        rows = strike_all(chosen, folder, asked.seed, asked.seconds)
    for name, row in rows.items():
        print(f"{name}: {dict(row['kinds'])} of {row['points']} points, {len(row['problems'])} problems")
    return 1 if any(row["problems"] for row in rows.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
