"""The run in a terminal: one live panel, or a plain line per step where the output is a file or a pipe."""

from __future__ import annotations

import contextlib
import datetime
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from wikift.base.console import print, printable
from wikift.watch.health import slowest

Values = dict[str, Any]

_BLOCKS = "▁▂▃▄▅▆▇█"
_SMOOTH = 0.8  # what the curve keeps of its mean at each loss
_LABEL, _VALUE, _ABSENT = 10, 16, "-"
# (label, the key it needs, its text): in the panel each has its line and column from the first frame on
_CELLS: tuple[tuple[str, str, Callable[[Values], str]], ...] = (
    ("loss", "loss", lambda v: f"{v['loss']:.4f}"),
    ("ppl", "loss", lambda v: f"{exp(v['loss']):,.2f}"),
    ("eval loss", "eval_loss", lambda v: f"{v['eval_loss']:.4f}"),
    ("eval ppl", "eval_perplexity", lambda v: f"{v['eval_perplexity']:,.2f}"),
    ("best eval", "best_eval_loss", lambda v: f"{v['best_eval_loss']:.4f}"),
    ("best step", "best_step", lambda v: f"{v['best_step']:,}"),
    ("grad norm", "grad_norm", lambda v: f"{v['grad_norm']:.3f}"),
    ("lr", "learning_rate", lambda v: f"{v['learning_rate']:.2e}"),
    ("tokens/s", "tokens_per_second", lambda v: f"{v['tokens_per_second']:,.0f}"),
    ("data wait", "data_wait", lambda v: _highest(v, "data_wait", "{:.1%}")),
    ("memory", "memory_gb", lambda v: _highest(v, "memory_gb", "{:.2f} GB")),
    ("slowest", "ranks", lambda v: _slowest(v["ranks"]["matmul_ms"])),
    ("saved", "saved_step", lambda v: f"step {v['saved_step']:,}"),
    ("stall", "save_stall_seconds", lambda v: f"{v['save_stall_seconds']:.2f} s"),
    ("skipped", "skipped_steps", lambda v: f"{v['skipped_steps']:,}"),
    ("mfu", "mfu", lambda v: f"{v['mfu']:.1%}"),
)
_IN_LINE = ("loss", "ppl", "eval loss", "eval ppl", "grad norm", "lr", "tokens/s", "memory", "skipped", "mfu")
_LONG, _EVERY = 2.0, 30.0  # seconds until something is worth a word, and between two lines about it in a pipe
_STALE = 0.5  # seconds after which the panel's numbers are measured anew, at the step after the next
_MOST_LOSSES = 2048


class Terminal:
    """A view of a run of `steps` steps, `epochs` passes: a live panel on `console`, or lines where that is no terminal.

    `earlier` are the lines of metrics.jsonl that a resumed run has already.
    """

    def __init__(self, steps: int, console: Console, epochs: float = 0.0, earlier: Iterable[Values] = ()) -> None:
        self.steps, self.console = steps, console
        self.shown: Values = {"epochs": epochs}
        self.losses: list[float] = []
        self.started = self.measured = self.since = time.monotonic()  # since: what is shown as `now` began
        self.next_line = self.since + _LONG
        self.width = console.width
        for values in earlier:
            self._learn({name: values.get(name) for name in ("step", "loss", "eval_loss", "eval_perplexity")})
        self.live: Live | None = None
        if console.is_terminal:
            self.live = Live(console=console, get_renderable=self.panel)

    def say(self, text: str, style: str = "") -> None:
        if self.live is not None:
            if self.console.width != self.width:
                self.live.refresh()
            self.console.print(Text(printable(text), style))
        else:
            print(text, flush=True)

    def impatient(self) -> bool:
        """Whether the panel's numbers are older than they should be."""
        return self.live is not None and time.monotonic() - self.measured > _STALE

    def tick(self, values: Values) -> None:
        """Take what is shown; `now` is what the run does, and after a colon how far it is."""
        before, after = (str(shown.get("now")).partition(":")[0] for shown in (self.shown, self.shown | values))
        if before != after:
            self.since = time.monotonic()
        self._learn(values)
        if self.live is not None:  # what the scrollback keeps
            for text in permanent(values, self.shown):
                self.say(text)

    def _learn(self, values: Values) -> None:
        shown, loss, score = self.shown | values, values.get("loss"), values.get("eval_loss")
        if score is not None and score < shown.get("best_eval_loss", math.inf):
            shown |= {"best_eval_loss": score, "best_step": values["step"]}
        if loss is not None:
            self.measured = time.monotonic()
            if math.isfinite(loss):
                self.losses.append(loss)
            if len(self.losses) >= _MOST_LOSSES:
                self.losses = [(a + b) / 2 for a, b in zip(self.losses[::2], self.losses[1::2], strict=False)]
        self.shown = shown

    def record(self, values: Values) -> None:
        self.tick(values)
        if self.live is None:
            print(line(values, self.steps), flush=True)
            self.next_line = time.monotonic() + _EVERY

    def warn(self, text: str) -> None:
        self.shown = self.shown | {"warnings": (*self.shown.get("warnings", ()), text)}
        self.say(f"warning: {text}", "yellow")

    def now(self) -> str | None:
        """What the run does, and for how many seconds where that is long."""
        now, seconds = self.shown.get("now"), time.monotonic() - self.since
        return f"{now}, {seconds:.0f} s" if now and seconds >= _LONG else now

    def panel(self) -> Panel:
        width, clock, shown = self.console.width, time.monotonic(), self.shown
        if self.live is not None and width < self.width and (shape := self.live._live_render._shape):
            # the terminal has wrapped the last frame, which is to be painted over
            self.live._live_render._shape = (width, shape[1] * math.ceil(shape[0] / width))
        self.width = width
        # not to the right edge: what a terminal echoes for Ctrl-C would wrap there and spoil the frame
        width = min(width - 3, 120)
        times = {"now": self.now(), "elapsed": clock - self.started}
        if shown.get("seconds_left") is not None:
            times["seconds_left"] = max(0.0, shown["seconds_left"] - (clock - self.measured))
        curve = "" if self.console.options.ascii_only else draw(self.losses, width - 4)
        return panel({**shown, **times}, self.steps, width, curve)

    def beat(self, ended: threading.Event) -> None:
        """Print what takes long, until `ended`."""
        while not ended.wait(0.5):
            now = self.now()
            if now != self.shown.get("now") and time.monotonic() >= self.next_line:
                print(f"  {now}", flush=True)
                self.next_line = time.monotonic() + _EVERY


@contextlib.contextmanager
def open_terminal(steps: int, epochs: float = 0.0, earlier: Iterable[Values] = ()) -> Iterator[Terminal]:
    """The view on standard output."""
    terminal = Terminal(steps, Console(file=sys.stdout), epochs, earlier)
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


def line(values: Values, steps: int) -> str:
    """One step as a plain line."""
    parts = [
        f"{label} {text(values)}" for label, key, text in _CELLS if label in _IN_LINE and values.get(key) is not None
    ]
    if values.get("seconds_left") is not None:
        parts.append(f"time left {duration(values['seconds_left'])}")
    return f"step {values['step']:,}/{steps:,}  " + "  ".join(parts)


def permanent(values: Values, shown: Values) -> Iterator[str]:
    """A line for a validation and for a checkpoint in `values`."""
    if values.get("eval_loss") is not None:
        best = ", the best so far" if shown["best_step"] == values["step"] else ""
        perplexity = f", eval ppl {values['eval_perplexity']:,.2f}" if "eval_perplexity" in values else ""
        yield f"step {values['step']:,}: eval loss {values['eval_loss']:.4f}{perplexity}{best}"
    if values.get("saved_step") is not None:
        took = f"{values['save_seconds']:.1f} s, of which training waited {values['save_stall_seconds']:.2f} s"
        yield f"step {values['saved_step']:,}: saved in {took}"


def panel(values: Values, steps: int, width: int, curve: str = "") -> Panel:
    """One frame, `width` columns wide; `curve` is a line of the loss so far."""
    step, inner = values.get("step", 0), width - 4
    epoch = f", epoch {values['epochs'] * step / max(1, steps):.2f}" if values.get("epochs") else ""
    title = f"step {step:,} of {steps:,}, {step / max(1, steps):.1%}{epoch}"
    bar = Table.grid(expand=True)  # a bar of its own ends without a line's end, and swallows what follows
    bar.add_row(ProgressBar(total=max(1, steps), completed=step))
    pairs = max(1, inner // (_LABEL + _VALUE))
    cells = Table.grid(padding=0)
    for _ in range(pairs):
        cells.add_column(width=_LABEL, style="dim", no_wrap=True)
        cells.add_column(width=inner // pairs - _LABEL, style="bold", no_wrap=True)
    texts = [(label, text(values) if values.get(key) is not None else _ABSENT) for label, key, text in _CELLS]
    for start in range(0, len(texts), pairs):
        cells.add_row(*(part for pair in texts[start : start + pairs] for part in pair))
    warnings = values.get("warnings", ())
    last = f"{len(warnings)} warning{'s' * (len(warnings) > 1)}, {warnings[-1]}" if warnings else "no warnings"
    lines = (
        (_times(values), ""), (curve, "cyan"), cells, (str(values.get("now") or "training"), ""),
        (last, "yellow" if warnings else "dim"),
    )  # fmt: skip
    shown = [
        Text(item[0], style=item[1], no_wrap=True, overflow="ellipsis") if isinstance(item, tuple) else item
        for item in lines
    ]
    return Panel(Group(bar, *shown), title=title[: width - 6], title_align="left", width=width)  # else wider


def draw(losses: Sequence[float], width: int) -> str:
    """The smoothed course of `losses`, its highest and lowest value at its sides."""
    smooth = list(accumulate(losses, lambda mean, loss: _SMOOTH * mean + (1 - _SMOOTH) * loss))
    columns = min(width - 18, len(smooth))
    if columns < 2:
        return ""
    points = [smooth[index * (len(smooth) - 1) // (columns - 1)] for index in range(columns)]
    low, high = min(points), max(points)
    steps = (len(_BLOCKS) - 1) / max(high - low, 1e-9)
    return f"{high:8.4f} " + "".join(_BLOCKS[round((point - low) * steps)] for point in points) + f" {low:.4f}"


def duration(seconds: float) -> str:
    """3,725 -> 1:02:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def exp(value: float) -> float:
    """A perplexity; infinite where it is too large for a number."""
    return math.inf if value >= 700 else math.exp(value)  # NaN stays NaN


def _times(values: Values) -> str:
    left, ends = values.get("seconds_left"), _ABSENT
    if left is not None and left < 1e8:
        ends = f"{datetime.datetime.now() + datetime.timedelta(seconds=left):%a %H:%M}"
    told = _ABSENT if left is None else duration(left)
    return f"elapsed {duration(values.get('elapsed', 0)):<10}left {told:<10}ends {ends}"


def _slowest(times: Sequence[float]) -> str:
    return "rank {}, {:.2f}x".format(*slowest(times)) if all(times) else _ABSENT


def _highest(values: Values, name: str, form: str) -> str:
    """The number of the only rank, or the highest of all and whose it is."""
    each = values.get("ranks", {}).get(name) or [values[name]]
    rank = max(range(len(each)), key=each.__getitem__)
    return form.format(each[rank]) + (f", rank {rank}" if len(each) > 1 else "")
