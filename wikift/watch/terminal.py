"""The run in a terminal: one live panel, or a plain line per step where the output is a file or a pipe."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator
from typing import Any

from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text


class Terminal:
    """A view of a run of `steps` steps; `live` is None where the output is no terminal."""

    def __init__(self, steps: int, live: Live | None) -> None:
        self.steps, self.live = steps, live
        self.shown: dict[str, Any] = {}

    def say(self, text: str) -> None:
        if self.live is not None:
            self.live.console.print(Text(text))
        else:
            print(text, flush=True)

    def tick(self, values: dict[str, Any]) -> None:
        """Refresh the panel."""
        if self.live is not None:
            self.shown |= values
            # not to the right edge: what a terminal echoes for Ctrl-C would wrap there and spoil the frame
            self.live.update(panel(self.shown, self.steps, min(self.live.console.width - 3, 120)))

    def record(self, values: dict[str, Any]) -> None:
        self.tick(values)
        if self.live is None:
            print(line(values, self.steps), flush=True)


@contextlib.contextmanager
def open_terminal(steps: int) -> Iterator[Terminal]:
    """The view on standard output."""
    console = Console(file=sys.stdout)
    if not console.is_terminal:
        yield Terminal(steps, None)
        return
    with Live(console=console, refresh_per_second=4, transient=False) as live:
        yield Terminal(steps, live)


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
