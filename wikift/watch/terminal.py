"""The run in a terminal: one live panel, or a plain line per step where the output is a file or a pipe."""

from __future__ import annotations

import contextlib
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_LONG, _EVERY = 2.0, 30.0  # seconds until something is worth a word, and between two lines about it in a pipe


class Terminal:
    """A view of a run of `steps` steps: a live panel on `console`, or lines where that is no terminal."""

    def __init__(self, steps: int, console: Console) -> None:
        self.steps, self.console = steps, console
        self.shown: dict[str, Any] = {}
        self.since = time.monotonic()  # what is shown as `now` began
        self.next_line = self.since + _LONG
        self.live = Live(console=console, get_renderable=self.panel) if console.is_terminal else None

    def say(self, text: str) -> None:
        if self.live is not None:
            self.console.print(Text(text))
        else:
            print(text, flush=True)

    def tick(self, values: dict[str, Any]) -> None:
        """Take what is shown; `now` is what the run does, and after a colon how far it is."""
        before, after = (str(shown.get("now")).partition(":")[0] for shown in (self.shown, self.shown | values))
        if before != after:
            self.since = time.monotonic()
        self.shown = self.shown | values

    def record(self, values: dict[str, Any]) -> None:
        self.tick(values)
        if self.live is None:
            print(line(values, self.steps), flush=True)
            self.next_line = time.monotonic() + _EVERY

    def now(self) -> str | None:
        """What the run does, and for how many seconds where that is long."""
        now, seconds = self.shown.get("now"), time.monotonic() - self.since
        return f"{now}, {seconds:.0f} s" if now and seconds >= _LONG else now

    def panel(self) -> Panel:
        # not to the right edge: what a terminal echoes for Ctrl-C would wrap there and spoil the frame
        return panel({**self.shown, "now": self.now()}, self.steps, min(self.console.width - 3, 120))

    def beat(self, ended: threading.Event) -> None:
        """Print what takes long, until `ended`."""
        while not ended.wait(0.5):
            now = self.now()
            if now != self.shown.get("now") and time.monotonic() >= self.next_line:
                print(f"  {now}", flush=True)
                self.next_line = time.monotonic() + _EVERY


@contextlib.contextmanager
def open_terminal(steps: int) -> Iterator[Terminal]:
    """The view on standard output."""
    terminal = Terminal(steps, Console(file=sys.stdout))
    if terminal.live is not None:
        with terminal.live:
            yield terminal
        return
    ended = threading.Event()
    threading.Thread(target=terminal.beat, args=(ended,), name="wikift-beat", daemon=True).start()
    try:
        yield terminal
    finally:
        ended.set()


@contextlib.contextmanager
def phase(name: str, say: Callable[[str], None]) -> Iterator[None]:
    """Say what begins, and at its end how long it took where that was long."""
    say(f"{name} ...")
    start = time.monotonic()
    yield
    if (seconds := time.monotonic() - start) >= _LONG:
        say(f"{name} took {seconds:.0f} s")


def line(values: dict[str, Any], steps: int) -> str:
    """One step as a plain line."""
    return f"step {values['step']:,}/{steps:,}  " + "  ".join(f"{name} {text}" for name, text in _parts(values))


def panel(values: dict[str, Any], steps: int, width: int | None = None) -> Panel:
    """One step as a live panel, `width` columns wide or as wide as the terminal."""
    step = values.get("step", 0)
    parts = [Text.assemble((name + " ", "dim"), (text, "bold")) for name, text in _parts(values)]
    bar = Table.grid(expand=True)  # a bar of its own ends without a line's end, and swallows what follows
    bar.add_row(ProgressBar(total=max(1, steps), completed=step))
    title = f"step {step:,} of {steps:,}"
    return Panel(Group(bar, Columns(parts, padding=(0, 2))), title=title, title_align="left", width=width)


def _parts(values: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, text) of everything worth showing in `values`, in a fixed order."""
    shown = (
        ("loss", "loss", "{:.4f}"), ("ppl", "perplexity", "{:,.2f}"), ("eval loss", "eval_loss", "{:.4f}"),
        ("eval ppl", "eval_perplexity", "{:,.2f}"), ("norm", "grad_norm", "{:.3f}"), ("lr", "learning_rate", "{:.2e}"),
        ("tok/s", "tokens_per_second", "{:,.0f}"), ("mfu", "mfu", "{:.1%}"), ("memory", "memory_gb", "{:.2f} GB"),
        ("skipped", "skipped_steps", "{}"), ("now", "now", "{}"), ("saved", "saved", "{}"),
    )  # fmt: skip
    if values.get("loss") is not None:
        values = {"perplexity": _exp(values["loss"]), **values}
    parts = [(name, form.format(values[key])) for name, key, form in shown if values.get(key) is not None]
    if values.get("seconds_left") is not None:
        parts.append(("time left", duration(values["seconds_left"])))
    return parts


def duration(seconds: float) -> str:
    """3,725 -> 1:02:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _exp(value: float) -> float:
    return math.inf if value >= 700 else math.exp(value)  # NaN stays NaN
