"""What every benchmark shares: the machine's description, interleaved rounds, medians, JSON and Markdown out.

    figures = interleave({"wikift": ours, "run_clm": theirs}, rounds=3)     # each a function -> {figure: number}
    write("data", "Text to tokens", table(figures, against="run_clm", figure="MB/s"), figures, settings={"MB": 540})

Loads move a machine's absolute figures by 10% and more within a minute, so the contestants take turns (the order
turning round each time) and what may be claimed is a ratio of two medians of one run, or the median of the rounds'
ratios. A contestant that pollutes its process (imports, threads, memory) runs in one of its own: `timed` for a whole
command, `Process` for one that lives through all rounds. A figure's name ends in its unit; "/s" is better higher, all
else lower.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

Contestant = Callable[[], Mapping[str, float]]
Figures = dict[str, dict[str, list[float]]]  # contestant -> figure -> one value per round


def machine(*packages: str) -> dict[str, Any]:
    """The processor, its cores, memory, accelerators, and the versions of Python, torch and `packages`."""
    names = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    fields = dict(reversed([[part.strip() for part in line.split(":", 1)] for line in names if ":" in line]))
    flags = fields.get("flags", "").split()
    found: dict[str, Any] = {
        "cpu": fields.get("model name", platform.processor()),
        "cpu_family_model": f"{fields.get('cpu family', '?')}/{fields.get('model', '?')}",
        "cpu_features": [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags],
        "cores": cores(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpus": _gpus(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
    }
    for package in ("torch", *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _gpus() -> list[str]:
    try:
        asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split("\n")[:-1]
    except (OSError, subprocess.CalledProcessError):
        return []


def interleave(contestants: Mapping[str, Contestant], rounds: int, *, uncounted: int = 0) -> Figures:
    """Let the contestants take turns `rounds` times, every second round in the opposite order. Progress to stderr.

    `uncounted` rounds come before: the first turn of all was slower by a third and more, whoever's it was.
    """
    figures: Figures = {name: {} for name in contestants}
    for number in range(-uncounted, rounds):
        for name in list(contestants) if number % 2 == 0 else reversed(list(contestants)):
            start = time.perf_counter()
            found = contestants[name]()
            if number < 0:
                continue
            for figure, value in found.items():
                figures[name].setdefault(figure, []).append(value)
            last = ", ".join(f"{figure} {values[-1]:.4g}" for figure, values in figures[name].items())
            seconds = time.perf_counter() - start
            print(f"round {number + 1} of {rounds}, {name}: {last} ({seconds:.1f} s)", file=sys.stderr, flush=True)
    return figures


def options(doc: str | None, name: str, *, rounds: int) -> argparse.ArgumentParser:
    """A parser of what every benchmark takes: --rounds, and where its results go."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="default benchmarks/results")
    parser.add_argument("--name", default=name, help=f"of the files there; default {name}")
    return parser


# Linux hands a process's peak memory on to what it starts, so the measuring is done by a process that is small.
_SMALL = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
seconds = time.perf_counter() - start
print(json.dumps([code, seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6]))
"""


def timed(command: Sequence[str], environment: Mapping[str, str] | None = None) -> tuple[float, float]:
    """Seconds of a command, and the largest resident memory of it or one of its children, in 10^6 bytes.

    Raises RuntimeError with the end of its stderr where it fails.
    """
    ran = subprocess.run(
        [sys.executable, "-c", _SMALL, *command], cwd=ROOT, env={**os.environ, **(environment or {})},
        capture_output=True, text=True, errors="replace", check=True,
    )  # fmt: skip
    code, seconds, megabytes = json.loads(ran.stdout)
    if code:
        raise RuntimeError(f"{' '.join(command)}:\n{ran.stderr[-4000:]}")
    return seconds, megabytes


class Process:
    """A contestant that lives through all rounds: it answers a line with a line of JSON. Use as a context manager.

    `python -m MODULE ARGUMENTS`, on `ranks` processes under torchrun; the first answer comes unasked, in `first`.
    """

    def __init__(self, module: str, *arguments: str, ranks: int = 1) -> None:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # DeepSpeed calls ninja
        self.process = subprocess.Popen(
            [sys.executable, *launch, "-m", module, *arguments],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": str(max(1, cores() // ranks)), "PATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        self.first = self._answer()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()  # it ends where its input does
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.errors.close()

    def ask(self, line: object) -> dict[str, Any]:
        """Send a line, wait for the answer. Raises RuntimeError with the end of its stderr where it ended instead."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith('{"'):  # libraries print too, the Trainer dicts in Python's way
                return dict(json.loads(line))
        code = self.process.wait()
        self.errors.seek(0)
        text = self.errors.read().decode(errors="replace")
        raise RuntimeError(f"{' '.join(map(str, self.process.args))} ended with {code}:\n{text[-4000:]}")


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def median(figures: Figures, name: str, figure: str) -> float:
    return statistics.median(figures[name][figure])


def ratio(figures: Figures, name: str, against: str, figure: str) -> tuple[float, float, float]:
    """Lowest, median and highest of the rounds' ratios `name` / `against`."""
    ratios = [a / b for a, b in zip(figures[name][figure], figures[against][figure], strict=True)]
    return min(ratios), statistics.median(ratios), max(ratios)


def table(figures: Figures, *, against: str, figure: str, also: Sequence[str] = ()) -> list[str]:
    """Markdown: one line per contestant, the medians of its figures, and its ratio of `figure` to that of `against`.

    `also`: more figures whose ratios are wanted.
    """
    names = list(dict.fromkeys(name for values in figures.values() for name in values))
    heads = [*names, *(f"{compared}, times {against}" for compared in (figure, *also))]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for contestant, values in figures.items():
        cells = [f"{statistics.median(values[name]):,.4g}" if name in values else "" for name in names]
        for compared in (figure, *also):
            ratios = ratio(figures, contestant, against, compared) if compared in values else None
            cells.append(f"{ratios[1]:.3g} ({ratios[0]:.3g} to {ratios[2]:.3g})" if ratios else "")
        lines.append(f"| {contestant} | {' | '.join(cells)} |")
    return lines


def _asked() -> str:
    """The command as it was typed, less where its results went."""
    name = Path(sys.argv[0]).resolve()
    words = [f'"{word}"' if set(word) & set("| ,'$") else word for word in sys.argv[1:]]
    if "--results" in words:
        place = words.index("--results")
        del words[place : place + 2]
    start = f"python -m benchmarks.{name.stem}" if name.parent.name == "benchmarks" else f"python {name.name}"
    return " ".join([start, *words])


def write(
    name: str,
    title: str,
    lines: Sequence[str],
    figures: Figures,
    *,
    settings: Mapping[str, Any],
    about: Mapping[str, Any] | None = None,
    how: str | None = None,
    folder: Path = RESULTS,
    against: Mapping[str, str] | None = None,
) -> None:
    """Write `folder`/NAME.json (machine, settings, every round) and NAME.md (`lines`), and print the latter.

    `how`: what the numbers are, where they are no medians of interleaved rounds; `against`: which contestant each is
    compared with, where later runs of the same benchmark are to be compared (benchmarks.compare).
    """
    about = dict(about or machine())
    rounds = max((len(v) for values in figures.values() for v in values.values()), default=0)
    now = time.strftime("%Y-%m-%d")
    content = {"name": name, "date": now, "machine": about, "settings": dict(settings), "against": dict(against or {})}
    content["rounds"] = figures
    shown = ", ".join(f"{key} {', '.join(value) if isinstance(value, list) else value}" for key, value in about.items())
    given = ", ".join(f"{key} {value}" for key, value in settings.items())
    text = "\n".join(
        (
            f"# {title}",
            "",
            *lines,
            "",
            f"{how or f'Medians of {rounds} interleaved rounds'}, `{_asked()}`, {now}; {given}.",
            "",
            f"Machine: {shown}.",
            "",
        )
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)
