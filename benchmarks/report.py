"""docs/explanation/performance.md out of the stored results: what was reached against which aim, and every table.

    python -m benchmarks.report [--results benchmarks/results] [--out docs/explanation/performance.md]

What stands in that file between `<!-- by hand: NAME -->` and `<!-- end by hand -->` is kept as it is; all else is made
anew. One such place follows each table: for profiles, for where the rest of the time goes.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.compare import better_higher
from benchmarks.harness import RESULTS, ROOT

HEAD = """\
# Performance

Made by `python -m benchmarks.report` from `benchmarks/results/`, where every round of every contestant is; what stands
between the marks "by hand" is written by hand and kept. Contestants took turns on the same machine; a ratio is the
median of the rounds' ratios, its range in brackets. Absolute figures drift with the machine, ratios hardly. Nothing was
measured on a GPU, and what is on paper only says so. `make bench` runs a small set of all in ten minutes and names what
became worse.
"""
BY_HAND = re.compile(r"<!-- by hand: (\S+) -->\n(.*?)<!-- end by hand -->", re.DOTALL)
NOT_YET = "Where the rest of the time goes: not profiled yet.\n"
PAGES = ("train", "train-fp32")  # whose tables are on the page; of other results it has the name

OTHERS = ("fp32", "avx2")  # the same on a processor without bf16 products
COMPILED_PEERS = ("Trainer, compiled", "plain loop, compiled", "nanoGPT's method", "LitGPT's method")
WIKIFT = ("wikift", "wikift, compiled")


class Aim(NamedTuple):
    """The best of `ours`, times the best of `against` (itself where that is empty), is to reach `wanted`."""

    text: str
    name: str
    figure: str
    wanted: float
    ours: tuple[str, ...] = WIKIFT
    against: tuple[str, ...] = ()


AIMS = (
    Aim("training step, times the Trainer (2.2 is hoped for)", "train", "tokens/s", 2.0, against=("Trainer",)),
    Aim("times the Trainer, compiled", "train", "tokens/s", 1.5, against=("Trainer, compiled",)),
    Aim("times the best compiled peer", "train", "tokens/s", 1.3, against=COMPILED_PEERS),
    Aim("two ranks, times one process", "train-ranks", "tokens/s", 0.95, ("wikift ddp, 2 ranks",), ("wikift",)),
    Aim("text to store, MB/s", "data", "MB/s", 100.0),
    Aim("largest process of it, MB", "data", "memory MB", 1000.0),
    Aim("opening a store, ms", "data", "open ms", 50.0, ("wikift's store",)),
    Aim("random blocks, GB/s", "data", "GB/s", 1.0, ("wikift's store",)),
    Aim("checkpoint's stall, times the best peer", "checkpoint", "stall s", 1.0,
        against=("Trainer", "DCP async_save", "DeepSpeed")),
    Aim("first step, times run_clm", "startup", "first step s", 1.0, ("wikift",), ("run_clm",)),
    Aim("generation of one text, times model.generate", "generate", "tokens/s", 1.5,
        ("wikift, 1 at once",), ("model.generate, 1 at once",)),
)  # fmt: skip


def reached(aim: Aim, results: Mapping[str, Any]) -> tuple[str, float] | None:
    """Whose figure it is, and the figure; None where that was not measured."""
    rounds = results["rounds"]
    sign = 1 if better_higher(aim.figure) else -1

    def best(names: tuple[str, ...]) -> str | None:
        there = [name for name in names if aim.figure in rounds.get(name, {})]
        return max(there, key=lambda name: sign * statistics.median(rounds[name][aim.figure]), default=None)

    ours, other = best(aim.ours), best(aim.against)
    if ours is None or (aim.against and other is None):
        return None
    values = rounds[ours][aim.figure]
    if other is not None:
        values = [a / b for a, b in zip(values, rounds[other][aim.figure], strict=True)]
    return f"{ours} / {other}" if other else ours, statistics.median(values)


def aims(stored: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The table of aims."""
    yield from ("| | aim | reached | | contestants | results |", "|---|---|---|---|---|---|")
    for aim in AIMS:
        higher = better_higher(aim.figure)
        wanted = f"{'≥' if higher else '≤'} {aim.wanted:g}"
        measured = {
            name: reached(aim, stored[name])
            for name in (aim.name, *(f"{aim.name}-{which}" for which in OTHERS))
            if name in stored
        }
        if not any(measured.values()):
            yield f"| {aim.text} | {wanted} | | not measured | | {aim.name} |"
        for name, found in measured.items():
            if found is not None:
                who, value = found
                met = value >= aim.wanted if higher else value <= aim.wanted
                yield f"| {aim.text} | {wanted} | {value:.3g} | {'yes' if met else '**no**'} | {who} | {name} |"


def page(results: Path, before: str) -> str:
    """The whole file; `before` is the one there, whose parts by hand go on."""
    kept = dict(BY_HAND.findall(before))
    stored = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in results.glob("*.json")}
    machines: list[str] = []
    parts = [HEAD, "## Aims\n", *aims(stored), "", _by_hand("aims", kept)]
    others = ["| results | | machine | date |", "|---|---|---|---|"]
    for name in (*(name for name in PAGES if name in stored), *sorted(set(stored) - set(PAGES))):
        machine = ", ".join(f"{key} {value}" for key, value in _machine(stored[name]).items())
        machines += [machine] if machine and machine not in machines else []
        letter = chr(ord("A") + machines.index(machine)) if machine else ""
        text = (results / f"{name}.md").read_text(encoding="utf-8")
        lines = [line for line in text.splitlines() if not line.startswith("Machine: ")]
        title = lines[0].removeprefix("# ")
        if name in PAGES:
            parts += [
                f"## {title} ({name})\n",
                "\n".join(lines[1:]).strip(),
                f"\nMachine {letter}.\n",
                _by_hand(name, kept),
            ]
        else:
            others.append(f"| `{name}.md` | {title} | {letter} | {stored[name].get('date', '')} |")
    parts += ["## Other results, in benchmarks/results/\n", *others, ""] if len(others) > 2 else []
    parts.append("## Machines\n")
    parts += [f"- {chr(ord('A') + number)}: {machine}" for number, machine in enumerate(machines)]
    parts += [f"\n{_block(name, text)}" for name, text in kept.items()]  # of tables that are no more
    return "\n".join(parts) + "\n"


def _machine(results: Mapping[str, Any]) -> dict[str, Any]:
    """What of a machine makes figures another's; the versions of peers are in the results."""
    words = ("cpu", "cpu_family_model", "cpu_features", "cores", "memory_gb", "system", "python", "torch")
    found = {key: results["machine"].get(key) for key in words}
    return {key: ", ".join(v) if isinstance(v, list) else v for key, v in found.items() if v is not None}


def _by_hand(name: str, kept: dict[str, str]) -> str:
    return _block(name, kept.pop(name, NOT_YET)) + "\n"


def _block(name: str, text: str) -> str:
    return f"<!-- by hand: {name} -->\n{text}<!-- end by hand -->"


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "explanation" / "performance.md")
    given = parser.parse_args()
    before = given.out.read_text(encoding="utf-8") if given.out.exists() else ""
    given.out.write_text(page(given.results, before), encoding="utf-8")
    print(given.out, file=sys.stderr)


if __name__ == "__main__":
    main()
