"""A run's folder read back, for all that is shown of it afterwards. Imports neither torch nor rich."""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wikift.base.errors import UserError, one_line
from wikift.base.files import read_json, read_jsonl
from wikift.base.folders import EVALUATIONS, METRICS, SAMPLES, list_checkpoints, run_config
from wikift.base.publish import lock_file


@dataclass(frozen=True)
class RunRecord:
    """`rows` are the logged steps and `events` the run's health, as metrics.jsonl has them; `scores` evaluate's."""

    path: Path
    name: str
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    events: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    scores: list[dict[str, Any]]

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.config.get("settings", {}))

    @property
    def derived(self) -> dict[str, Any]:
        return dict(self.config.get("derived", {}))

    @property
    def done(self) -> int:
        """The last step that was logged."""
        return max((row["step"] for row in self.rows), default=0)

    def numbers(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of each logged step that has a finite `key`."""
        pairs = [(row["step"], row.get(key)) for row in self.rows]
        return [(step, value) for step, value in pairs if isinstance(value, (int, float)) and math.isfinite(value)]

    @property
    def best(self) -> tuple[int, float] | None:
        """(step, loss) of the best validation."""
        return min(self.numbers("eval_loss"), key=lambda pair: pair[1], default=None)

    @property
    def seconds(self) -> float:
        """Of training, without validations and saves."""
        before, seconds = 0, 0.0
        for row in self.rows:
            tokens, speed = row.get("tokens"), row.get("tokens_per_second")
            if tokens and speed:
                seconds, before = seconds + (tokens - before) / speed, tokens
        return seconds

    @property
    def state(self) -> str:
        """running, finished (early stopping included) or stopped."""
        if is_running(self.path):
            return "running"
        saved = list_checkpoints(self.path)
        manifest = read_json(saved[-1] / "manifest.json") if saved else {}
        patience = self.settings.get("early_stopping_patience")
        early = patience and manifest.get("validations_since_best", 0) >= patience
        return "finished" if early or manifest.get("step", 0) >= self.derived.get("steps", math.inf) else "stopped"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of metrics.jsonl or samples.jsonl."""
    return [values for values in read_jsonl(path) if isinstance(values.get("step"), int)]


@contextlib.contextmanager
def told_of_damage() -> Iterator[None]:
    """What files of runs raise whose values are of other types than a run writes, as a message for the user."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(
            f"RUN: its config.json, metrics, samples or evaluations are damaged ({reason}); copy it again"
        ) from None


def read_run(path: Path, name: str = "") -> RunRecord:
    """The run in `path`. Raises UserError where it is no run's folder."""
    config, lines = run_config(path), read_metrics(path / METRICS)
    rows, events = ([line for line in lines if ("event" in line) is kind] for kind in (False, True))
    samples, scores = read_metrics(path / SAMPLES), read_jsonl(path / EVALUATIONS)
    return RunRecord(path, name or path.absolute().name, config, rows, events, samples, scores)


def read_runs(paths: Sequence[str], problems: Sequence[str] = ()) -> list[RunRecord]:
    """The runs, each with a name of its own. Raises UserError for all that are none, with other `problems`."""
    problems, runs = list(problems), list[RunRecord]()
    names = [Path(path).absolute().name for path in paths]
    for path, name in zip(paths, names, strict=True):
        try:
            runs.append(read_run(Path(path), name if names.count(name) == 1 else path.rstrip("/")))
        except UserError as error:
            problems += error.problems
    if len({Path(path).resolve() for path in paths}) < len(paths):
        problems.append(f"RUN {' '.join(paths)}: one of them is named twice; omit it")
    if problems:
        raise UserError(*problems)
    return runs


def is_running(run: Path) -> bool:
    """Whether a process of this host is writing to the run's folder."""
    lock = lock_file(run / "run")
    try:
        with open(lock, opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # nobody has begun
        return False
    return False


def differing(runs: Sequence[RunRecord], names: Sequence[str]) -> Iterator[tuple[str, list[Any]]]:
    """(setting, each run's value) of those of `names` that are not the same in all runs; one not recorded is None."""
    for name in names:
        values = [run.settings.get(name) for run in runs]
        if any(value != values[0] for value in values):
            yield name, values


def folder_bytes(folder: Path) -> int:
    """What the files below `folder` take up."""
    return sum(os.lstat(Path(root) / name).st_size for root, _, names in os.walk(folder) for name in names)


def aligned(rows: Sequence[Sequence[str]], *, right: bool = False) -> str:
    """`rows` as text in columns, all but the first of them flush `right`; the first row is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    signs = ["<", *(">" if right else "<" for _ in widths[1:])]
    lines = ("  ".join(f"{c:{s}{w}}" for c, s, w in zip(row, signs, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
