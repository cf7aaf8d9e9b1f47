"""metrics.jsonl is the truth; the terminal and Weights & Biases are views of it. Only rank 0 has any of them.

One line of metrics.jsonl is one step: what was measured of the step and, where one was due, of the validation after
it. A resumed run first drops the lines that lie after its checkpoint, so no step is there twice.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from wikift.base.errors import EnvironmentFault
from wikift.base.files import read_jsonl

SAMPLES = "samples.jsonl"


class Log:
    """Where a run speaks. Without views (other ranks) every method does nothing."""

    def __init__(
        self,
        file: TextIO | None = None,
        view: Live | None = None,
        wandb_run: Any = None,
        quiet: bool = True,
        steps: int = 0,
    ) -> None:
        self.file, self.view, self.wandb_run, self.quiet, self.steps = file, view, wandb_run, quiet, steps
        self.shown: dict[str, Any] = {}

    def say(self, text: str) -> None:
        """A line for the user."""
        if self.view is not None:
            self.view.console.print(Text(text))
        elif not self.quiet:
            print(text, flush=True)

    def record(self, values: dict[str, Any]) -> None:
        """One step's line, into the file and every view. Raises EnvironmentFault where the disk is full."""
        if self.file is None:
            return
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        try:
            self.file.write(json.dumps(finite) + "\n")
            self.file.flush()
        except OSError as error:
            raise EnvironmentFault(
                f"metrics.jsonl cannot be written ({error.strerror}); make room and run the same command to go on "
                "from the newest checkpoint"
            ) from None
        if self.wandb_run is not None:
            self.wandb_run.log({k: v for k, v in values.items() if k != "step"}, step=values["step"])
        self.tick(**values)
        if self.view is None and not self.quiet:
            print(line(values, self.steps), flush=True)

    def samples(self, step: int, prompts: Sequence[str], texts: Sequence[str]) -> None:
        """What the model writes at `step`: a line a prompt in samples.jsonl beside the metrics, a table in wandb."""
        if self.file is None:
            return
        rows = [{"step": step, "prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)]
        path = Path(self.file.name).with_name(SAMPLES)
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        except OSError as error:
            raise EnvironmentFault(f"{path} cannot be written ({error.strerror}); make room and go on") from None
        if self.wandb_run is not None:
            import wandb

            table = wandb.Table(columns=["step", "prompt", "text"], data=[list(row.values()) for row in rows])
            self.wandb_run.log({"samples": table}, step=step)
        first = " ".join((prompts[0] + texts[0]).split())
        self.say(f"step {step:,} writes: {first[:200]}")

    def tick(self, **values: Any) -> None:
        """Refresh the live view."""
        if self.view is not None:
            self.shown |= values
            # not to the right edge: what a terminal echoes for Ctrl-C would wrap there and spoil the frame
            self.view.update(panel(self.shown, self.steps, min(self.view.console.width - 3, 120)))


@contextlib.contextmanager
def open_log(
    run: Path, *, after_step: int, steps: int, quiet: bool, wandb: bool, settings: dict[str, Any]
) -> Iterator[Log]:
    """Rank 0's log of a run that goes on after `after_step`.

    Raises EnvironmentFault where metrics.jsonl cannot be written (its lines stay as they are) or wandb cannot start.
    """
    path = run / "metrics.jsonl"
    with contextlib.ExitStack() as stack:
        try:
            keep_until(path, after_step)
            keep_until(path.with_name(SAMPLES), after_step)
            file = stack.enter_context(open(path, "a", encoding="utf-8"))
        except OSError as error:
            raise EnvironmentFault(
                f"{path} cannot be written ({error.strerror}); make room or mend its permissions, then run the same "
                "command again"
            ) from None
        wandb_run = stack.enter_context(_wandb_run(run, settings, quiet)) if wandb else None
        view = None
        console = Console(file=sys.stdout)
        if console.is_terminal and not quiet:
            view = stack.enter_context(Live(console=console, refresh_per_second=4, transient=False))
        yield Log(file, view, wandb_run, quiet, steps)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl; the last one may be torn by a kill and is left out then."""
    return [row for row in read_jsonl(path) if isinstance(row.get("step"), int)]


def keep_until(path: Path, step: int) -> None:
    """Drop the lines after `step`, and a torn one, by one rename."""
    if path.exists():
        kept = [
            json.dumps(values, ensure_ascii=False) + "\n" for values in read_metrics(path) if values["step"] <= step
        ]
        aside = path.with_name(path.name + ".partial")
        aside.write_text("".join(kept), encoding="utf-8")
        os.replace(aside, path)


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
    return math.inf if value >= 700 else math.exp(value)  # not a number stays that


@contextlib.contextmanager
def _wandb_run(run: Path, settings: dict[str, Any], quiet: bool) -> Iterator[Any]:
    import wandb

    # its copy of the terminal would hold every frame of the live view
    chosen = wandb.Settings(console="off")
    if quiet:
        chosen.silent = True
    name = run / "wandb-id.txt"  # the same run goes on there when training is resumed
    if not name.exists():
        name.write_text(uuid.uuid4().hex[:12])
    try:
        started = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "wikift"),
            name=os.environ.get("WANDB_NAME", run.name),
            id=name.read_text().strip(),
            resume="allow",
            dir=run,
            config=settings,
            settings=chosen,
        )
    except Exception as error:
        words = " ".join(str(error).split())[:200]
        raise EnvironmentFault(
            f"--wandb: Weights & Biases did not start ({words}); "
            "set WANDB_MODE=offline, run `wandb login`, or leave --wandb out"
        ) from None
    code = 1
    try:
        yield started
        code = 0
    finally:
        started.finish(exit_code=code)
