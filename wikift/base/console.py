"""What is printed: messages, and how far a long task has come. (The live panel of a training is `watch.terminal`.)"""

from __future__ import annotations

import builtins
import errno
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO, TypeVar

Part = TypeVar("Part")
# What a terminal obeys instead of showing it: C0 without tab and newline, delete, C1, ends of lines and changes of
# direction of Unicode's, and halves of surrogate pairs, which cannot be written
_OBEYED = (*range(9), *range(11, 32), *range(127, 160), *range(0x2028, 0x202F), *range(0x2066, 0x206A))
_SHOWN = {code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" for code in (*_OBEYED, *range(0xD800, 0xE000))}


def printable(text: str) -> str:
    """`text` with its control characters spelled out: names, data and models may hold any."""
    return text.translate(_SHOWN)


def print(*values: object, sep: str = " ", end: str = "\n", file: TextIO | None = None, flush: bool = False) -> None:
    """`print` for messages: no control character reaches a terminal. Every module of wikift takes this one."""
    try:
        builtins.print(*(printable(str(value)) for value in values), sep=sep, end=end, file=file, flush=flush)
    except OSError as error:
        if error.errno != errno.EIO:  # the terminal was closed, and a run saves at the signal that tells of it
            raise


class Progress:
    """One line, rewritten twice a second on a terminal; elsewhere a line every ten seconds; nothing where `quiet`."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.terminal = sys.stderr.isatty()
        self.pause_seconds = 0.5 if self.terminal else 10.0
        self.started = self.last = time.monotonic()
        self.shown = False

    def over(
        self, name: str, size: int | None, parts: Iterator[Part], count: Callable[[Part], tuple[int, int]]
    ) -> Iterator[Part]:
        """Pass `parts` on. `size` is the bytes of text to come, about; `count` returns a part's bytes and tokens."""
        self.started = self.last = time.monotonic()
        done = tokens = 0
        for part in parts:
            yield part
            more = count(part)
            done, tokens = done + more[0], tokens + more[1]
            if self.due():
                self.show(self._line(name, size, done, tokens))

    def _line(self, name: str, size: int | None, done: int, tokens: int) -> str:
        """`train: 14.1 MB, 1.3 MB/s, 3,054,627 tokens, 7%, 2 min left`; the last two only where `size` is known."""
        per_second = done / max(self.last - self.started, 1e-9)
        text = f"{name}: {done / 1e6:,.1f} MB, {per_second / 1e6:.1f} MB/s" + (f", {tokens:,} tokens" if tokens else "")
        if size and per_second and done < size:  # an estimate, it may be passed
            text += f", {100 * done / size:.0f}%, {_duration((size - done) / per_second)} left"
        return text

    def fraction(self, name: str, done: float) -> None:
        """Where a line is due, `name: 41%, 3 min left`; `done` from 0 to 1, an estimate that may be more."""
        if self.due():
            left = (self.last - self.started) * (1 - done) / done if 0 < done < 1 else 0.0
            self.show(f"{name}: {min(done, 1):.0%}, {_duration(left)} left" if done else f"{name}: reading")

    def due(self) -> bool:
        """Whether the line shown last is old enough for another."""
        now = time.monotonic()
        if now - self.last < self.pause_seconds:
            return False
        self.last = now
        return True

    def show(self, text: str) -> None:
        """Print `text`, on a terminal in place of what was shown before."""
        if self.quiet:
            return
        text = printable(text)
        if self.terminal:
            width = os.get_terminal_size(sys.stderr.fileno()).columns  # a line that wraps could not be rewritten
            text = "\r" + text[: width - 1] + "\x1b[K"
        self.shown = True  # first, as Ctrl-C may come in between
        builtins.print(text, end="" if self.terminal else "\n", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Remove the line from a terminal, for what is printed next."""
        if self.shown and self.terminal:
            builtins.print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        self.shown = False


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
