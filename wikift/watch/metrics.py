"""metrics.jsonl is the truth; the terminal and the trackers are views of it. Only rank 0 has any of them.

One line of metrics.jsonl is one step: what was measured of the step and, where one was due, of the validation after
it. A resumed run first removes the lines after its checkpoint, so no step is there twice.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from wikift.base.console import print
from wikift.base.errors import EnvironmentFault
from wikift.base.files import json_line, replace_text
from wikift.base.folders import METRICS, SAMPLES
from wikift.watch import health
from wikift.watch.hang import Pulse
from wikift.watch.record import read_metrics
from wikift.watch.terminal import Terminal, open_terminal
from wikift.watch.trackers import Tracker, open_trackers


class Log:
    """What a run tells. Without a file (other ranks) and views every method does nothing."""

    def __init__(
        self,
        file: TextIO | None = None,
        terminal: Terminal | None = None,
        trackers: Sequence[Tracker] = (),
        earlier: Sequence[dict[str, Any]] = (),
    ) -> None:
        self.file, self.terminal, self.trackers, self.pulse = file, terminal, trackers, Pulse()
        self.recent, self.logged = deque(earlier, maxlen=health.WINDOW), len(earlier)

    def say(self, text: str) -> None:
        """A line for the user."""
        if self.terminal is not None:
            self.terminal.say(text)

    def impatient(self) -> bool:
        """Whether a live view waits for numbers."""
        return self.terminal is not None and self.terminal.impatient()

    def tick(self, **values: Any) -> None:
        """Refresh the live view; `now`, what this rank does, is a sign of life."""
        if "now" in values:
            self.pulse.mark(values["now"])
        if self.terminal is not None:
            self.terminal.tick(values)

    def record(self, values: dict[str, Any]) -> None:
        """One step's line, into the file and every view. Raises EnvironmentFault where the disk is full."""
        if self.file is None:
            return
        self._write(values)
        if self.terminal is not None:
            self.terminal.record(values)
        for event in health.events(list(self.recent), values, self.logged):
            self.event(event)
        self.recent.append(values)
        self.logged += 1

    def event(self, event: dict[str, Any]) -> None:
        """Something to worry about: a line of its own in the file, and a warning."""
        if self.file is None:
            return
        self._write(event)
        if self.terminal is not None:
            self.terminal.warn(f"step {event['step']:,}: {event['message']}")

    def _write(self, values: dict[str, Any]) -> None:
        assert self.file is not None
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        with _writing(Path(self.file.name)):
            self.file.write(json_line(finite) + "\n")
            self.file.flush()
        for tracker in self.trackers:
            tracker.record(values)

    def sync(self) -> None:
        """Put what was recorded on the disk, before a checkpoint from which a run resumes after it."""
        if self.file is not None:
            with _writing(Path(self.file.name)):
                os.fsync(self.file.fileno())

    def samples(self, step: int, prompts: Sequence[str], texts: Sequence[str]) -> None:
        """What the model writes at `step`: a line per prompt in samples.jsonl beside the metrics, and trackers."""
        if self.file is None:
            return
        rows = [{"step": step, "prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)]
        path = Path(self.file.name).with_name(SAMPLES)
        with _writing(path), open(path, "a", encoding="utf-8") as file:
            file.writelines(json_line(row) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        for tracker in self.trackers:
            tracker.samples(step, rows)
        first = " ".join((prompts[0] + texts[0]).split())
        self.say(f"step {step:,} writes: {first[:200]}")


@contextlib.contextmanager
def open_log(
    run: Path, *, after_step: int, steps: int, epochs: float, quiet: bool, trackers: Sequence[str] = (), rank: int = 0
) -> Iterator[Log]:
    """Rank 0's log of a run that resumes after `after_step`; a silent one on other ranks.

    Raises EnvironmentFault where metrics.jsonl cannot be written (its lines stay as they are) or a tracker fails.
    """
    if rank != 0:
        yield Log()
        return
    path = run / METRICS
    with contextlib.ExitStack() as stack:
        with _writing(path):
            earlier = [row for row in keep_until(path, after_step) if "event" not in row]
            keep_until(run / SAMPLES, after_step)
            file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        stack.callback(_close, file)
        views = stack.enter_context(
            open_trackers(run, trackers, quiet, lambda text: print(f"wikift: warning: {text}", file=sys.stderr))
        )
        terminal = None if quiet else stack.enter_context(open_terminal(steps, epochs, earlier))
        yield Log(file, terminal, views, earlier)


def _close(file: TextIO) -> None:
    """What a full disk had no room for is tried once more."""
    with _writing(Path(file.name)):
        file.close()


def keep_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Remove the lines after `step`, and an incomplete one, by one rename; returns the others."""
    if not path.exists():
        path.unlink(missing_ok=True)  # a link to nothing, through which lines would be written
        return []
    kept = [values for values in read_metrics(path) if values["step"] <= step]
    replace_text(path, "".join(json_line(values) + "\n" for values in kept))
    return kept


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EnvironmentFault(
            f"{path} cannot be written ({error.strerror}); free disk space or fix its permissions, then run the same "
            "command again to resume"
        ) from None
