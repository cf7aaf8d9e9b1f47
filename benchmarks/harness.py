"""What every benchmark shares: the machine's description, interleaved rounds, medians, JSON and Markdown out.

Loads move a machine's absolute figures by 10% and more within a minute, so the contestants take turns (the order
turning round each time) and what may be claimed is the median of the rounds' ratios. A contestant that pollutes its
process (imports, threads, memory) runs in one of its own: `timed` for a whole command, `Process` for one that lives
through all rounds. A figure's name ends in its unit; "/s" is better higher, all else lower.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

Contestant = Callable[[], Mapping[str, float]]
Figures = dict[str, dict[str, list[float]]]  # contestant -> figure -> one value per round


def machine(*packages: str) -> dict[str, Any]:
    """The processor, its cores, memory, accelerators, and the versions of Python, torch and `packages`."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    fields = dict(reversed([[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]))
    features = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in fields.get("flags", "")]
    about: dict[str, Any] = {
        "cpu": fields.get("model name", platform.processor()),
        "cpu_family_model": f"{fields.get('cpu family', '?')}/{fields.get('model', '?')}",
        "cpu_features": features,
        "cores": cores(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpus": gpus(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
    }
    return about | {package: version(package) for package in ("torch", *packages)}


def cores() -> int:
    return len(os.sched_getaffinity(0))


def gpus() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(asked, capture_output=True, text=True).stdout.splitlines()


def interleave(contestants: Mapping[str, Contestant], rounds: int, *, uncounted: int = 0) -> Figures:
    """Let the contestants take turns `rounds` times, every second round in the opposite order. Progress to stderr.

    `uncounted` rounds come before: the first turn of all was slower by a third and more, whoever's it was.
    """
    figures: Figures = {name: {} for name in contestants}
    for number in range(-uncounted, rounds):
        for name in list(contestants) if number % 2 == 0 else reversed(list(contestants)):
            measured = contestants[name]()
            print(f"round {number + 1} of {rounds}, {name}: {measured}", file=sys.stderr, flush=True)
            for figure, value in measured.items() if number >= 0 else ():
                figures[name].setdefault(figure, []).append(value)
    return figures


def options(doc: str | None, name: str, *, rounds: int, shape: Sequence[int] = ()) -> argparse.ArgumentParser:
    """A parser of what every benchmark takes: --rounds, where its results go, and a GPT-2's `shape`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="default benchmarks/results")
    parser.add_argument("--name", default=name, help=f"of the files there; default {name}")
    for option, default in zip(("layers", "width", "heads"), shape, strict=False):
        parser.add_argument(f"--{option}", type=int, default=default)
    return parser


# Linux hands a process's peak memory on to what it starts, so the measuring is done by a process that is small.
_SMALL = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
seconds = time.perf_counter() - start
print(json.dumps([code, seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6]))
"""


def timed(command: Sequence[str], **environment: str) -> tuple[float, float]:
    """Seconds of a command, and the largest resident memory of it or one of its children, in 10^6 bytes.

    Raises RuntimeError with the end of its stderr where it fails.
    """
    start, variables = [sys.executable, "-c", _SMALL], {**os.environ, **environment}
    ran = subprocess.run([*start, *command], cwd=ROOT, env=variables, capture_output=True, text=True, check=True)
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
        self.process = subprocess.Popen(
            [sys.executable, *launch, "-m", module, *arguments],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": str(max(1, cores() // ranks))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        self.first = self._answer()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.process.communicate(timeout=20)  # it ends where its input does
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
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


def table(figures: Figures, against: str, *compared: str) -> list[str]:
    """Markdown: a line per contestant, the medians of its figures, and ratios of those `compared` with `against`'s."""
    names = list(dict.fromkeys(name for values in figures.values() for name in values))
    heads = [*names, *(f"{figure}, times {against}" for figure in compared)]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for contestant, values in figures.items():
        cells = [f"{statistics.median(values[name]):,.4g}" if name in values else "" for name in names]
        for figure in compared:
            pairs = zip(values.get(figure, ()), figures[against].get(figure, ()), strict=False)
            ratios = [own / other for own, other in pairs]
            cells.append(f"{statistics.median(ratios):.3g} ({min(ratios):.3g} to {max(ratios):.3g})" if ratios else "")
        lines.append(f"| {contestant} | {' | '.join(cells)} |")
    return lines


def write(
    given: argparse.Namespace,
    title: str,
    figures: Figures,
    lines: Sequence[str],
    *,
    about: Mapping[str, Any],
    **settings: Any,
) -> None:
    """Write NAME.json (machine, settings, every round) and NAME.md (`lines`) where `options` says; print the latter."""
    rounds = max((len(v) for values in figures.values() for v in values.values()), default=0)
    now = time.strftime("%Y-%m-%d")
    content = {"name": given.name, "date": now, "machine": about, "settings": settings, "rounds": figures}
    told = ", ".join(f"{key} {value}" for key, value in settings.items())
    shown = ", ".join(f"{key} {', '.join(value) if isinstance(value, list) else value}" for key, value in about.items())
    command = shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    ran = f"Medians of {rounds} interleaved rounds, `{command}`, {now}; {told}."
    text = "\n".join([f"# {title}", "", *lines, "", ran, "", f"Machine: {shown}.", ""])
    given.results.mkdir(parents=True, exist_ok=True)
    (given.results / f"{given.name}.json").write_text(json.dumps(content, indent=1) + "\n")
    (given.results / f"{given.name}.md").write_text(text, encoding="utf-8")
    print(text)
