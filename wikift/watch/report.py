"""Runs as one HTML file that needs nothing else, or as text: what they were, how they went, what came out.

The curves are drawn by uPlot (uplot.min.js, MIT), which is inlined: of the maintained libraries with zoom and a cursor
it is the smallest, 51 KB, where plotly.js' basic bundle and ECharts take a megabyte each.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from string import Template
from typing import Any, NamedTuple

from wikift import __version__
from wikift.watch.record import RunRecord, aligned, differing
from wikift.watch.trackers import tokens_of_epoch

_CHARTS = {  # title: what of metrics.jsonl it shows, and the name of that
    "Loss": {"loss": "training", "eval_loss": "validation"},
    "Learning rate": {"learning_rate": "learning rate"},
    "Gradient norm": {"grad_norm": "norm"},
    "Throughput, tokens per second": {"tokens_per_second": "tokens/s"},
    "Memory of the first process, GB": {"memory_gb": "memory"},
    "Waiting for data, fraction of the time": {"data_wait": "wait"},
}
_SCORES = ["text", "split", "protocol", "context", "stride", "step", "perplexity", "word_perplexity", "bits_per_byte"]
_ROWS, _SAMPLES, _CHARACTERS = 24_000, 400, 4_000  # of all runs, and of a sample: a report stays below 5 MB


class Section(NamedTuple):
    """A table; `rows[0]` is its head."""

    title: str
    rows: list[list[str]]
    note: str = ""
    folded: bool = False


def as_html(runs: Sequence[RunRecord], roles: Mapping[str, Sequence[str]]) -> str:
    """The page. `roles`: the settings' names by role."""
    summary, *others = (_part(section.title, _table(section), section.folded) for section in _sections(runs, roles))
    commands = "".join(f"<pre>{html.escape(str(run.config.get('command')))}</pre>" for run in runs)
    logged = {key for run in runs for row in run.rows for key in row}
    charts = [
        {"title": title, "curves": [{"key": key, "label": label} for key, label in curves.items() if key in logged]}
        for title, curves in _CHARTS.items()
        if logged & set(curves)
    ]
    data = {"runs": [_curves(run, _ROWS // len(runs)) for run in runs], "charts": charts}
    title, folder = runs[0].name if len(runs) == 1 else f"{len(runs)} runs", Path(__file__).parent
    return Template((folder / "report.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(title),
        subtitle=html.escape(", ".join(str(run.path) for run in runs) + f"; wikift {__version__}"),
        version=__version__,
        top=summary,
        bottom="\n".join([*others[:2], _samples(runs), *others[2:], _part("Command", commands)]),
        smooth=f"{max(0.0, min(0.9, 1 - 40 / max(1, *(len(run.rows) for run in runs), 1))):.2f}",
        data=json.dumps(data).replace("<", "\\u003c"),  # no text of a run ends the script
        plot_style=(folder / "uplot.min.css").read_text(encoding="utf-8"),
        plot_code=(folder / "uplot.min.js").read_text(encoding="utf-8"),
    )


def as_text(runs: Sequence[RunRecord], roles: Mapping[str, Sequence[str]]) -> str:
    """The page's tables, for a terminal or a mail; of the settings those that differ, or all of one run."""
    sections = [part for part in _sections(runs, roles) if not part.folded or len(runs) == 1]
    parts = [f"{part.title}\n{aligned(part.rows) if part.rows else part.note}" for part in sections]
    return "\n\n".join([*parts, "\n".join(["Command", *(str(run.config.get("command")) for run in runs)])])


def _sections(runs: Sequence[RunRecord], roles: Mapping[str, Sequence[str]]) -> list[Section]:
    """Summary, health and evaluation, then settings and environment."""
    names = ["", *(run.name for run in runs)]
    events = [[run.name, f"{e['step']:,}", str(e["event"]), _what(e)] for run in runs for e in run.events]
    scores = [[run.name, *(_text(score.get(key)) for key in _SCORES)] for run in runs for score in run.scores]
    sections = [
        Section("Summary", [names, *_side_by_side([_facts(run) for run in runs])]),
        Section("Health", [["run", "step", "event", "what"], *events] if events else [], "no events"),
        Section(
            "Evaluation",
            [["run", *(key.replace("_", " ") for key in _SCORES)], *scores] if scores else [],
            "none yet: wikift evaluate RUN",
        ),
    ]
    if len(runs) > 1:
        rows = [[f"{n} ({role})", *map(_text, v)] for role in roles for n, v in differing(runs, roles[role])]
        sections.append(Section("Settings that differ", [names, *rows] if rows else [], "none"))
    for role, settings in roles.items():
        values = [{name: run.settings.get(name) for name in settings} for run in runs]
        sections.append(Section(f"Settings: {role}", [names, *_side_by_side(values)], folded=True))
    return [*sections, Section("Environment", [names, *_side_by_side(list(map(_environment, runs)))], folded=True)]


def _side_by_side(columns: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A row for each key that has a value in one of `columns`."""
    rows = [
        [key, *(_text(column.get(key)) for column in columns)] for key in dict.fromkeys(k for c in columns for k in c)
    ]
    return [row for row in rows if any(row[1:])]


def _facts(run: RunRecord) -> dict[str, str]:
    """What a run came to."""
    from wikift.watch.terminal import duration  # by rich, which `--help` does not wait for

    tokens, losses, validations = (run.numbers(key) for key in ("tokens", "loss", "eval_loss"))
    facts = {"state": run.state, "steps": f"{run.done:,} of {run.derived.get('steps', 0):,}"}
    if tokens:
        facts["tokens"] = f"{tokens[-1][1]:,.0f}, {tokens[-1][1] / tokens_of_epoch(run.config):.2f} epochs"
        facts["training time"] = duration(run.seconds)
    if losses:
        facts["training loss, last"] = f"{losses[-1][1]:.4f}"
    if run.best is not None:
        for name, (step, loss) in (("best", run.best), ("last", validations[-1])):
            facts[f"validation loss, {name}"] = f"{loss:.4f}, step {step:,}"
            facts[f"validation perplexity, {name}"] = f"{math.exp(min(loss, 99)):,.2f}"
    for name, key, form in (("tokens per second", "tokens_per_second", ",.0f"), ("MFU", "mfu", ".1%")):
        if pairs := run.numbers(key):
            facts[f"{name}, median"] = format(median(value for _, value in pairs), form)
    if memory := run.numbers("memory_gb"):
        facts["memory, peak"] = f"{max(value for _, value in memory):.2f} GB"
    return facts


def _environment(run: RunRecord) -> dict[str, Any]:
    config, store = run.config, run.config.get("store") or {}
    facts = {"wikift": config.get("wikift"), **(config.get("environment") or {})}
    facts |= {f"commit of {name}": commit for name, commit in (config.get("commits") or {}).items()}
    facts |= {f"data: {name}": store.get(name) for name in ("dataset", "dataset_config", "revision")}
    layout, shape = run.derived.get("place") or {}, run.derived.get("shape") or {}
    return facts | {name.replace("_", " "): value for name, value in {**layout, **shape}.items()}


def _what(event: Mapping[str, Any]) -> str:
    """An event's message, and its numbers."""
    rest = {key: value for key, value in event.items() if key not in ("step", "event", "message")}
    return "; ".join([*filter(None, [event.get("message")]), *(f"{key} {_text(value)}" for key, value in rest.items())])


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _curves(run: RunRecord, most: int) -> dict[str, Any]:
    """The run's numbers, thinned to about `most` rows: of each stretch those with the lowest and the highest loss."""
    rows, size = run.rows, math.ceil(2 * len(run.rows) / most)
    if size > 2:
        kept = {i for i, row in enumerate(rows) if row.get("eval_loss") is not None} | {0, len(rows) - 1}
        for start in range(0, len(rows), size):
            stretch = sorted(range(start, min(start + size, len(rows))), key=lambda i: rows[i].get("loss") or 0.0)
            kept |= {stretch[0], stretch[-1]}
        rows = [rows[i] for i in sorted(kept)]
    columns = {key: [_rounded(row.get(key)) for row in rows] for curves in _CHARTS.values() for key in curves}
    columns = {key: values for key, values in columns.items() if any(value is not None for value in values)}
    steps = [row["step"] for row in rows]
    columns |= {"step": steps, "tokens": [step * run.derived.get("tokens_per_step", 1) for step in steps]}
    return {
        "name": run.name,
        "epoch": tokens_of_epoch(run.config),
        "columns": columns,
        "events": [e["step"] for e in run.events],
    }


def _rounded(value: Any) -> float | None:
    return float(f"{value:.6g}") if isinstance(value, (int, float)) and math.isfinite(value) else None


def _table(section: Section) -> str:
    if not section.rows:
        return f"<p>{html.escape(section.note)}</p>"
    lines = []
    for number, row in enumerate(section.rows):
        name, *values = map(html.escape, row)
        kind, scope = ("td", "row") if number else ("th scope=col", "col")
        lines.append(
            f"<tr><th scope={scope}>{name}</th>" + "".join(f"<{kind}>{v}</{kind[:2]}>" for v in values) + "</tr>"
        )
    return f'<div class="wide" tabindex="0"><table>{"".join(lines)}</table></div>'


def _part(title: str, body: str, folded: bool = False, is_open: bool = False) -> str:
    if folded:
        return f"<details{' open' * is_open}><summary>{html.escape(title)}</summary>{body}</details>"
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>"


def _samples(runs: Sequence[RunRecord]) -> str:
    """What the models wrote, by step, the newest first and shown."""
    by_step: dict[tuple[str, int], str] = {}
    for run in runs:
        newest = max((row["step"] for row in run.samples), default=0)
        for row in reversed(run.samples[-(_SAMPLES // len(runs)) :]):
            text = html.escape(str(row["text"])[:_CHARACTERS])
            title = f"step {row['step']:,}" if len(runs) == 1 else f"{run.name}, step {row['step']:,}"
            key = (title, row["step"] == newest)
            sample = f'<div class="sample"><b>{html.escape(str(row["prompt"]))}</b>{text}</div>'
            by_step[key] = sample + by_step.get(key, "")
    parts = (_part(title, body, folded=True, is_open=bool(newest)) for (title, newest), body in by_step.items())
    return _part("Samples", "".join(parts)) if by_step else ""
