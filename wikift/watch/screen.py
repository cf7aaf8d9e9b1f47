"""What the live panel shows: every cell has its line and column from the first frame on, so that nothing jumps."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from rich.console import Group
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from wikift.watch.health import slowest

Values = dict[str, Any]

_BLOCKS = "▁▂▃▄▅▆▇█"
_SMOOTH = 0.8  # what the curve keeps of its mean at each loss
_LABEL, _VALUE, _ABSENT = 10, 16, "-"
# (label, the key it needs, its text)
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
