"""The run in a terminal: one live panel, or a plain line per step where the output is a file or a pipe."""

from __future__ import annotations

import contextlib
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from wikift.base.console import print, printable
from wikift.watch.screen import Values, draw, duration, exp, panel

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
    return f"step {values['step']:,}/{steps:,}  " + "  ".join(f"{name} {text}" for name, text in _parts(values))


def permanent(values: Values, shown: Values) -> Iterator[str]:
    """A line for a validation and for a checkpoint in `values`."""
    if values.get("eval_loss") is not None:
        best = ", the best so far" if shown["best_step"] == values["step"] else ""
        parts = [f"{name} {text}" for name, text in _parts(values) if name.startswith("eval")]
        yield f"step {values['step']:,}: {', '.join(parts)}{best}"
    if values.get("saved_step") is not None:
        took = f"{values['save_seconds']:.1f} s, of which training waited {values['save_stall_seconds']:.2f} s"
        yield f"step {values['saved_step']:,}: saved in {took}"


def _parts(values: Values) -> list[tuple[str, str]]:
    """(name, text) of everything worth showing in `values`, in a fixed order."""
    shown = (
        ("loss", "loss", "{:.4f}"), ("ppl", "perplexity", "{:,.2f}"), ("eval loss", "eval_loss", "{:.4f}"),
        ("eval ppl", "eval_perplexity", "{:,.2f}"), ("norm", "grad_norm", "{:.3f}"), ("lr", "learning_rate", "{:.2e}"),
        ("tok/s", "tokens_per_second", "{:,.0f}"), ("mfu", "mfu", "{:.1%}"), ("memory", "memory_gb", "{:.2f} GB"),
        ("skipped", "skipped_steps", "{}"), ("now", "now", "{}"), ("saved", "saved", "{}"),
    )  # fmt: skip
    if values.get("loss") is not None:
        values = {"perplexity": exp(values["loss"]), **values}
    parts = [(name, form.format(values[key])) for name, key, form in shown if values.get(key) is not None]
    if values.get("seconds_left") is not None:
        parts.append(("time left", duration(values["seconds_left"])))
    return parts
