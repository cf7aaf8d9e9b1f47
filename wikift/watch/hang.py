"""Signs of life of every rank, and where all of them are when one is missing.

A thread of each rank writes its beats into RUN/stacks/rank-N.beat and reads the others'. Files, since a store would be
gone with the rank that serves it. Nothing in it is collective.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TextIO

from wikift.base.console import print
from wikift.base.errors import EXIT_FAULT
from wikift.base.files import faults_of_writing
from wikift.base.folders import STACKS

_BEAT_SECONDS = 1  # so that beats are seconds
_SAMPLES = 20  # of what the main thread does, in a beat
_KEPT_SAMPLES = 200
# files of functions in which a rank waits for others, or for its batches; a backward pass looks so too
_WAITING = ("/torch/", "/deepspeed/", "/base/world.py", "/threading.py")
_SILENT_BEATS = 10  # at most, until a rank without news is stopped, or its host is gone
_SPEAK_BEATS = 3  # after the stacks: until every rank has seen what the others do


class Pulse:
    """What this rank does. All ranks `mark` the same things in the same order, so that counts can be compared."""

    def __init__(self) -> None:
        self.count, self.doing = 0, "starting"
        self.samples = deque[bool](maxlen=_KEPT_SAMPLES)  # whether this rank was at work of its own

    def busy(self) -> float:
        """The fraction of the last seconds in which this rank did not wait for others; 0 until that is known."""
        samples = list(self.samples)
        return sum(samples) / len(samples) if len(samples) == self.samples.maxlen else 0.0

    def mark(self, doing: str | None = None) -> None:
        """Progress: `doing` begins, or what was begun goes on."""
        self.count += 1
        self.doing = doing or self.doing


@contextlib.contextmanager
def signs_of_life(run: Path, rank: int, size: int, seconds: float) -> Iterator[Pulse]:
    """Within, a run that makes no progress for `seconds` is ended on all `size` ranks, with every one's stacks.

    SIGUSR2 to any rank writes the stacks of all and ends nothing. The folder is removed where it has none.
    """
    folder, pulse, ended = run / STACKS, Pulse(), threading.Event()
    with faults_of_writing(run):
        folder.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # the stacks of a hang that the launcher's restart followed
            if (own := folder / f"rank-{rank}.txt").stat().st_size:
                own.rename(folder / f"rank-{rank}.before.txt")
        own.unlink(missing_ok=True)  # not to be written to: it may be a link
        file = open(own, "x", encoding="utf-8")  # noqa: SIM115  # for signals, until the end
    watch = _Watch(folder, rank, size, seconds, pulse, file)
    thread = threading.Thread(target=watch.run, args=(ended,), name="wikift-pulse", daemon=True)
    faulthandler.register(signal.SIGUSR2, file)
    thread.start()
    try:
        yield pulse
    finally:
        ended.set()
        thread.join()
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(signal.SIGUSR2)
        file.close()
        with contextlib.suppress(OSError):  # another rank's files, or the folder has gone
            (folder / f"rank-{rank}.beat").unlink(missing_ok=True)  # a run that ends within a beat
            if not (folder / f"rank-{rank}.txt").stat().st_size:
                (folder / f"rank-{rank}.txt").unlink()
        for _ in range(1 if rank else 20):  # rank 0 comes last: a run that never began leaves no folder
            with contextlib.suppress(OSError):
                folder.rmdir()
            if rank or not folder.exists():
                break
            time.sleep(0.05)


@dataclass(frozen=True)
class Seen:
    """What is known of a rank: the marks it passed, what it does, whether that is waiting, and for how long no news."""

    marks: int
    waits: bool
    doing: str
    silent: int = 0  # beats


class _Watch:
    """What the thread knows. Time is counted in its own beats: those of a job that was suspended as a whole stand."""

    def __init__(self, folder: Path, rank: int, size: int, seconds: float, pulse: Pulse, file: TextIO) -> None:
        self.folder, self.rank, self.size, self.seconds = folder, rank, size, seconds
        self.pulse, self.file, self.beats, self.idle, self.marks = pulse, file, 0, 0, 0
        self.seen: dict[int, Seen] = {}
        self.texts: dict[int, str] = {}
        self.sizes: dict[int, int] = {}  # of the stacks' files

    def run(self, ended: threading.Event) -> None:
        samples = 0
        while not ended.wait(_BEAT_SECONDS / _SAMPLES * (0.5 + samples * 0.618 % 1)):  # not in step with the steps
            samples += 1
            self.pulse.samples.append(not _waits(_main_frame()))
            if samples % _SAMPLES:
                continue
            # in C, for where this thread cannot run because another one keeps Python's lock
            faulthandler.dump_traceback_later(self.seconds + _SPEAK_BEATS, file=self.file)
            with contextlib.suppress(OSError):  # a full disk is not what this is for
                self.beat()
            if self.idle == self.seconds or self.asked():
                faulthandler.dump_traceback(self.file)
                self.asked()
            if self.idle >= self.seconds + _SPEAK_BEATS:
                self.end()

    def beat(self) -> None:
        """Tell what the main thread does, and read what the others do."""
        self.beats += 1
        self.idle = self.idle + 1 if self.marks == self.pulse.count else 0
        self.marks = self.pulse.count
        frame = _main_frame()
        where = f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"
        text = f"{self.beats} {self.marks} {int(_waits(frame))} {self.pulse.doing}, in {where}"
        (self.folder / f"rank-{self.rank}.beat").write_text(text, encoding="utf-8")
        for rank in range(self.size):
            with contextlib.suppress(FileNotFoundError):
                text = (self.folder / f"rank-{rank}.beat").read_text(encoding="utf-8")
                if rank in self.seen and text in ("", self.texts[rank]):
                    self.seen[rank] = replace(self.seen[rank], silent=self.seen[rank].silent + 1)
                elif len(parts := text.split(maxsplit=3)) == 4:
                    self.texts[rank], self.seen[rank] = text, Seen(int(parts[1]), parts[2] == "1", parts[3])

    def asked(self) -> bool:
        """Whether the stacks of another rank are new: those of all are wanted then."""
        before = self.sizes
        for rank in range(self.size):
            with contextlib.suppress(OSError):
                self.sizes = {**self.sizes, rank: (self.folder / f"rank-{rank}.txt").stat().st_size}
        grown = {rank for rank, size in self.sizes.items() if size > before.get(rank, 0)}
        return bool(grown) and self.rank not in grown

    def end(self) -> None:
        """Say who is missing, by the first of the ranks that are left, and leave."""
        least = min(_SILENT_BEATS, self.seconds / 2)
        silent = [rank for rank in range(self.size) if rank not in self.seen or self.seen[rank].silent >= least]
        if self.rank == min(set(range(self.size)) - set(silent), default=self.rank):
            for rank in silent:
                with open(self.folder / f"rank-{rank}.txt", "a", encoding="utf-8") as file:
                    file.write("no sign of life: the process is stopped, or its host is gone\n")
            text = told(self.seen, silent)
            print(
                f"wikift: no progress for {self.seconds:g} s (--hang-timeout): {text}. Every rank's stacks are in "
                f"{self.folder}. The same command resumes from the newest checkpoint",
                file=sys.stderr,
                flush=True,
            )
        os._exit(EXIT_FAULT)


def _main_frame() -> FrameType:
    return sys._current_frames()[threading.main_thread().ident or 0]


def _waits(frame: FrameType) -> bool:
    return any(part in frame.f_code.co_filename for part in _WAITING)


def told(seen: Mapping[int, Seen], silent: Sequence[int]) -> str:
    """Which rank the others wait for, by their signs of life, and what each does."""
    awake = {rank: one for rank, one in seen.items() if rank not in silent}
    first = max((one.marks for one in awake.values()), default=0)
    behind = [rank for rank, one in awake.items() if one.marks < first]
    busy = [rank for rank, one in awake.items() if not one.waits]
    lines = Counter(one.doing for one in awake.values())
    odd = [rank for rank, one in awake.items() if lines[one.doing] < max(lines.values())]
    if silent:
        why = f"rank {_listed(silent)} shows no sign of life (stopped, or its host is gone)"
    elif behind:
        why = f"rank {_listed(behind)} is behind the others"
    elif blamed := busy if 0 < len(busy) < len(awake) else odd:
        why = f"rank {_listed(blamed)} does not do what the others wait for"
    else:
        why = "no rank is behind the others"
    doing: dict[str, list[int]] = {}
    for rank, one in sorted(seen.items()):
        doing.setdefault(one.doing, []).append(rank)
    return "; ".join([why, *(f"rank {_listed(ranks)}: {text}" for text, ranks in doing.items())])


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
