"""A fault at every call that changes the disk, or reads it: what stands then, and what the same command makes of it.

    python -m tests.faults.points                       every point of every case (hours on two cores)
    python -m tests.faults.points --seconds 60 --seed 2 export    as many as fit, drawn with a seed, of some cases

Commands run in children forked from this process, which has loaded everything and a library (strike.c) that lets the
N-th such call below a folder fail, or be the process' last.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from tests.tiny import arguments, tiny_store

SOURCE = Path(__file__).with_name("strike.c")
KINDS = ("count", "kill", "full", "broken", "short", "unreadable")  # strike.c's, in its order
GROWING = ("write", "create", "mkdir")  # calls that want room
SECONDS = 60.0  # until a command hangs
LAUNCHER_SECONDS = 20.0  # until a launcher kills those who wait for one that ended before it met them
HUNG = 124
TEXT = "".join(f"the {i % 97} of {i % 1009} and an end .\n" for i in range(3000))


class Point(NamedTuple):
    """The call number `number` of `rank` that changes the disk, or of those that read it."""

    kind: str
    rank: int
    number: int


COUNT = Point("count", 0, 0)  # no fault


class Blow(NamedTuple):
    """A signal to a rank, or to all (None), some time after the start; SIGSTOP is followed by SIGCONT."""

    seconds: float
    signal: int
    rank: int | None


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


# --- what is there ---------------------------------------------------------------------------------------------------


def artifacts(root: Path) -> dict[str, str]:
    """A hash of everything published in `root`, by name; what is being moved aside counts as if it were not."""
    found: dict[str, Path] = {}
    for run in (root / "run" / ".before.partial", root / "run"):
        paths = [run / name for name in (".model.old", "model", ".hf.old", "hf", "config.json", "../out")]
        paths += [*run.glob("checkpoints/step-*"), *run.glob("before-*")]
        found |= {path.name.removeprefix(".").removesuffix(".old"): path for path in paths if path.exists()}
    return {name: _hash(path) for name, path in found.items()}


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        content = file.read_bytes() if file.is_file() else b""
        if file.name == "manifest.json":
            # settings: a step that was there may come from a command for fewer steps
            rest = {
                k: v for k, v in json.loads(content).items() if "seconds" not in k and k not in ("sha256", "settings")
            }
            content = json.dumps(rest).encode()
        if file.name == "metrics.jsonl":
            content = json.dumps(losses(file)).encode()
        digest.update(f"{file.relative_to(path)} {len(content)}".encode() + content)
    return digest.hexdigest()


def losses(file: Path) -> list[Any]:
    """What must be the same in two runs, by step; of a torn last line nothing."""
    rows = []
    for line in file.read_text().splitlines(keepends=True) if file.exists() else []:
        if line.endswith("\n"):
            values = json.loads(line)
            rows.append([values.get(name) for name in ("step", "loss", "grad_norm", "tokens", "eval_loss")])
    return rows


def _shared() -> set[str]:
    """Shared memory; semaphores, which other programs on this machine make and remove at any time, aside."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.")}


def names(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


# --- commands --------------------------------------------------------------------------------------------------------


def run(
    root: Path, line: Sequence[str], ranks: int = 1, point: Point = COUNT, blow: Blow | None = None
) -> tuple[list[int], str, list[list[list[str]]]]:
    """A command on `ranks` ranks, struck at `point` or by `blow`: exit codes, what was printed, each rank's calls.

    When a rank is killed at a point all are, as by a power cut. A command that hangs has code 124.
    """
    words = [word.replace("ROOT", str(root)) for word in line]
    logs = root.parent / "logs"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir()
    port, host = _store_host() if ranks > 1 else (0, 0)
    children = [_fork(root, logs, words, rank, ranks, point, port) for rank in range(ranks)]
    codes, began, failed = [HUNG] * ranks, time.monotonic(), 0.0
    while waiting := [rank for rank in range(ranks) if codes[rank] == HUNG]:
        seconds = time.monotonic() - began
        if blow is not None and seconds > blow.seconds:
            _signal([children[rank] for rank in waiting if blow.rank in (None, rank)], blow.signal)
            again = Blow(seconds + 0.3, signal.SIGCONT, blow.rank)
            blow = again if blow.signal == signal.SIGSTOP else None
        late = seconds > SECONDS
        failed = failed or seconds * any(code not in (0, 75, HUNG) for code in codes)
        launcher = failed and seconds > failed + LAUNCHER_SECONDS
        if late or launcher or (point.kind == "kill" and -signal.SIGKILL in codes):
            _signal([children[rank] for rank in waiting], signal.SIGKILL)
        for rank in waiting:
            done, status = os.waitpid(children[rank], 0 if late else os.WNOHANG)
            if done and not late:
                codes[rank] = os.waitstatus_to_exitcode(status)
        if late:
            break
        time.sleep(0.002)
    if host:
        _signal([host], signal.SIGKILL)
        os.waitpid(host, 0)
    calls = [[text.split("\t") for text in (logs / f"calls.{rank}").read_text().splitlines()] for rank in range(ranks)]
    return codes, (logs / "output").read_text(errors="replace"), calls


def orphans() -> bool:
    """Whether something that a command started still runs after some seconds."""
    for _ in range(300):
        try:
            if not os.waitpid(-1, os.WNOHANG)[0]:
                time.sleep(0.01)
        except ChildProcessError:
            return False
    return True


def _signal(pids: Sequence[int], number: int) -> None:
    for pid in pids:
        os.kill(pid, number)


def _store_host() -> tuple[int, int]:
    """A process in which the ranks meet, as they do in torchrun's: its port, its id."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        from torch.distributed import TCPStore

        store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        os.write(writing, str(store.port).encode())
        while True:
            signal.pause()
    os.close(writing)
    port = int(os.read(reading, 9))
    os.close(reading)
    return port, child


def _fork(root: Path, logs: Path, words: list[str], rank: int, ranks: int, point: Point, port: int) -> int:
    child = os.fork()
    if child == 0:
        output = os.open(logs / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        calls = os.open(logs / f"calls.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
        if ranks > 1:
            os.environ |= {name: str(value) for name, value in own.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
        struck = point if rank == point.rank else COUNT
        ctypes.CDLL(None).strike(str(root).encode(), KINDS.index(struck.kind), ctypes.c_long(struck.number), calls)
        _command(words)
    return child


def _command(words: list[str]) -> NoReturn:
    from wikift.commands.main import main, run

    sys.argv = ["wikift", *words]
    code: Any = 99
    try:
        run(main, words)
    except SystemExit as exit:
        code = exit.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# --- a case ----------------------------------------------------------------------------------------------------------


class Bench:
    """The folder of a case before the command, and what the command makes of it without a fault."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.root, self.template = case, folder / "root", folder / "template"
        self.root.mkdir(parents=True)
        tiny_store(self.root / "store", train=200)
        (self.root / "text.txt").write_text(TEXT)
        for line in case.before:
            ranks = case.ranks if line[0] == "train" else 1
            codes, output, _ = run(self.root, line, ranks)
            assert codes == [0] * ranks, (line, codes, output)
        shutil.copytree(self.root, self.template)
        self.old = artifacts(self.root)
        codes, output, self.calls = run(self.root, case.line, case.ranks)
        assert codes == [0] * case.ranks, (case, codes, output)
        self.new, self.names = artifacts(self.root), names(self.root)
        self.losses = losses(self.root / "run" / "metrics.jsonl")

    def points(self, random_: random.Random) -> list[Point]:
        """Every fault at every call, in an order drawn; a call like the one before and the one after it comes later."""
        points = []
        for rank, calls in enumerate(self.calls):
            for reading in (False, True):
                chosen = [call[:2] for call in calls if (call[0] == "read") == reading]
                for number, call in enumerate(chosen, 1):
                    alike = chosen[number - 2 : number + 1] == [call] * 3
                    kinds = ["unreadable"] if reading else ["kill", "broken"]
                    kinds += ["full"] * (call[0] in GROWING) + ["short"] * (call[0] == "write")
                    points += [(alike, random_.random(), Point(kind, rank, number)) for kind in kinds]
        return [point for *_, point in sorted(points)]

    def fault(self, point: Point) -> tuple[bool, list[str]]:
        """Strike at `point`, then run the same command; whether it was struck, and what is wrong."""
        shutil.rmtree(self.root)
        shutil.copytree(self.template, self.root)
        shared = _shared()
        codes, output, calls = run(self.root, self.case.line, self.case.ranks, point)
        struck = [call for call in calls[point.rank] if call[0].startswith("! ")]
        if not struck:
            return False, []
        wrong = self._after(codes, output, point)
        codes, output, _ = run(self.root, self.case.line, self.case.ranks)
        good = codes == [0] * self.case.ranks
        wrong += self._at_the_end(point) if good else [f"message: the same command {codes} {output}"]
        wrong += [f"left: in /dev/shm {left}"] if (left := _shared() - shared) else []
        wrong += ["process: one is left"] * orphans()
        return True, [f"{text}; {point} {struck[0]}" for text in wrong]

    def _after(self, codes: list[int], output: str, point: Point) -> list[str]:
        """What is wrong right after a fault: all is old or new, never half, and the old goes only for the new."""
        wrong, here, good = list[str](), artifacts(self.root), codes == [0] * self.case.ranks
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


# --- the order on the disk -------------------------------------------------------------------------------------------


def order_problems(calls: Sequence[Sequence[str]]) -> list[str]:
    """What a power cut could break: a rename of what is not on the disk yet, or a removal before the new name is."""
    dirty: set[str] = set()  # files with content, and folders with names, that are not on the disk
    logs: set[str] = set()  # files with content that have their name already
    renamed: set[str] = set()  # folders with a new name that is not
    wrong = []
    for call, one, two in calls:
        folder = os.path.dirname(one)
        if call == "write":
            (dirty if _aside(one) else logs).add(one)
        elif call in ("create", "mkdir"):
            dirty.add(folder)
        elif call == "fsync":
            dirty.discard(one)
            logs.discard(one)
            renamed.discard(one)
        elif call == "rename":
            unsynced = [*logs, *(path for path in dirty if path == one or path.startswith(one + "/"))]
            if unsynced and not _aside(two):
                wrong.append(f"order: {one} gets its name before {unsynced} is on the disk")
            dirty |= {folder, os.path.dirname(two)}
            if ".partial" in os.path.basename(one):
                renamed.add(os.path.dirname(two))
        elif call in ("unlink", "rmdir"):
            dirty.add(folder)
        if call in ("unlink", "rmdir", "rename") and not _aside(one) and (call != "rename" or _aside(two)) and renamed:
            wrong.append(f"order: {one} is removed before the names in {renamed} are on the disk")
    return wrong


def _aside(path: str) -> bool:
    return any(part.endswith((".partial", ".lock")) or part == "stacks" for part in Path(path).parts)


# --- all -------------------------------------------------------------------------------------------------------------


def strike_all(cases: Sequence[Case], folder: Path, seed: int, seconds: float) -> dict[str, dict[str, Any]]:
    """As many points of `cases` as fit into `seconds`, in turns; counts and problems by case."""
    random_ = random.Random(seed)
    rows: dict[str, dict[str, Any]] = {}
    benches: dict[str, tuple[Bench, list[Point]]] = {}
    for number, case in enumerate(cases):
        bench = Bench(case, folder / str(number))
        points = bench.points(random_)
        benches[case.name] = bench, points
        rows[case.name] = {"points": len(points), "kinds": Counter(), "problems": []}
        for calls in bench.calls:
            report(rows, case.name, order_problems(calls))
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(points for _, points in benches.values()):
        for name, (bench, points) in benches.items():
            if points and time.monotonic() < end:
                point = points.pop(0)
                struck, problems = bench.fault(point)
                rows[name]["kinds"][point.kind] += struck
                report(rows, name, problems)
    return rows


def report(rows: dict[str, dict[str, Any]], name: str, problems: Sequence[str]) -> None:
    """Keep what went wrong in a row, and tell it at once."""
    rows[name]["problems"] += problems
    for text in problems:
        print(f"{name}: {text}", flush=True)


def preloaded(module: str, words: Sequence[str]) -> None:
    """Start this program again with the library loaded, where it is not; compiled for each start."""
    if "strike.so" in os.environ.get("LD_PRELOAD", ""):
        return
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "strike.so"
        subprocess.run(
            [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-O1", SOURCE, "-o", library, "-ldl"], check=True
        )
        env = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        sys.exit(subprocess.run([sys.executable, "-m", module, *words], env=env).returncode)


def load() -> None:
    """What the commands import, once, and that orphans of theirs are this process' to see."""
    import importlib

    for module in ("tests.preload", "transformers.models.gpt2.modeling_gpt2", "wikift.training.run"):
        importlib.import_module(module)
    for command in ("prepare", "consolidate", "runs", "train"):
        importlib.import_module(f"wikift.commands.{command}")
    os.environ.pop("LOCAL_RANK", None)  # DeepSpeed's import set it
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    from wikift.base import failure

    failure._GRACE_SECONDS = 0.5


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.points")
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e9)
    asked = parser.parse_args(words)
    preloaded("tests.faults.points", words)
    load()
    chosen = [case for name, case in CASES.items() if not asked.cases or any(text in name for text in asked.cases)]
    with tempfile.TemporaryDirectory() as folder:
        rows = strike_all(chosen, Path(folder).resolve(), asked.seed, asked.seconds)
    for name, row in rows.items():
        print(f"{name}: {dict(row['kinds'])} of {row['points']} points, {len(row['problems'])} problems")
    return 1 if any(row["problems"] for row in rows.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
