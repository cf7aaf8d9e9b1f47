"""A small set of all benchmarks in at most ten minutes on two quiet cores, and what became worse since the last time.

    make bench                                # or: python -m benchmarks.bench [--only train startup] [--folder FOLDER]

Results go to benchmarks/results/bench/DATE-TIME/; keep the folders of a state that later ones are to be compared with.
Exit code 1 where a benchmark failed, or something is worse than in the newest results there of the same machine and
settings by more than the noise (benchmarks.compare says what that is), twice: what dropped is run again. The full
benchmarks, for docs/explanation/performance.md, are started one by one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.compare import Drop, drops, in_both, last
from benchmarks.harness import RESULTS, ROOT

SMALL_MODEL = ("--layers", "2", "--width", "256", "--heads", "4")
CONTESTS: dict[str, tuple[str, ...]] = {
    "data": ("--megabytes", "100", "--peers-megabytes", "8", "--rounds", "2"),
    "train": (*SMALL_MODEL, "--only", "^Trainer$|^plain|^wikift$", "--rounds", "3"),
    "checkpoint": (*SMALL_MODEL, "--rounds", "5"),
    "startup": (*SMALL_MODEL, "--rounds", "2"),
    "generate": ("--no-compiled", "--new-tokens", "32", "--rounds", "3"),
}


def main() -> int:
    """Run them, compare, and say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CONTESTS, default=list(CONTESTS))
    parser.add_argument("--folder", type=Path, default=RESULTS / "bench")
    given = parser.parse_args()
    begun = time.perf_counter()
    earlier = sorted(path for path in given.folder.glob("*") if path.is_dir())
    new = (given.folder / time.strftime("%Y-%m-%dT%H-%M-%S")).resolve()
    failed = run(given.only, new)
    found = said(new, earlier)
    if found:
        print("what dropped is run again")
        failed += run([name for name in CONTESTS if name in {drop.benchmark for drop in found}], new / "again")
        found = in_both(found, said(new / "again", earlier))
    print(f"{new}: {(time.perf_counter() - begun) / 60:.1f} minutes; {len(found)} drops in all runs")
    for name in failed:
        print(f"{name}: FAILED")
    return int(bool(found or failed))


def run(names: Sequence[str], folder: Path) -> list[str]:
    """Let the benchmarks write to `folder`; those that failed."""
    failed = []
    for name in names:
        start = time.perf_counter()
        ran = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{name}", *CONTESTS[name], "--results", str(folder)], cwd=ROOT
        )
        failed += [name] if ran.returncode else []
        print(f"{name}: {time.perf_counter() - start:.0f} s\n", flush=True)
    return failed


def said(new: Path, earlier: Sequence[Path]) -> list[Drop]:
    """Print how the results in `new` compare with the newest comparable ones; gives what dropped."""
    found: list[Drop] = []
    for path in sorted(new.glob("*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        old = last(results, earlier)
        dropped = [] if old is None else list(drops(results, old))
        found += dropped
        if old is None:
            print(f"{path.stem}: no earlier results of this machine to compare with")
        elif not dropped:
            print(f"{path.stem}: nothing worse than on {old['date']}")
        for drop in dropped:
            print(f"DROP {drop.text}")
    return found


if __name__ == "__main__":
    sys.exit(main())
