"""What an evaluation shows: a table with a column per model, or JSON lines."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wikift.base.files import json_line, read_jsonl, replace_text
from wikift.evaluation.protocols import Setup
from wikift.evaluation.score import Score, difference

_NAMES = {"tokens": "perplexity", "words": "word_perplexity", "bytes": "byte_perplexity", "bits/byte": "bits_per_byte"}


@dataclass(frozen=True)
class Result:
    """One model on one split by one protocol; `tokenizer` is its fingerprint."""

    model: str
    text: str
    split: str
    setup: Setup
    score: Score
    tokenizer: str
    facts: dict[str, Any]  # precision, processes, seconds

    @property
    def about(self) -> dict[str, Any]:
        """What was measured, by the names of the JSON output."""
        setup = self.setup
        return {
            "model": self.model, "text": self.text, "split": self.split, "protocol": setup.protocol.name,
            "context": setup.context, "stride": setup.stride, "scaled": setup.scaled,
        }  # fmt: skip

    @property
    def row(self) -> tuple[str, str, int]:
        """The models' results that are compared have the same one."""
        return self.split, self.setup.protocol.name, self.setup.index


_DOCUMENTS = 100_000  # of which a kept result has the counts, for paired comparisons


def keep(result: Result, file: Path, step: int | None) -> None:
    """Write the result into a run's `file`, by one rename; one of the same text, protocol and windows is replaced."""
    line = {**json.loads(as_json(result, [result])), "step": step}
    if len(result.score.nll) <= _DOCUMENTS:
        line["by_document"] = {name: counts.tolist() for name, counts in vars(result.score).items()}
    others = [row for row in read_jsonl(file) if any(row.get(k) != v for k, v in result.about.items() if k != "model")]
    replace_text(file, "".join(json_line(row) + "\n" for row in [*others, line]))


def as_json(result: Result, results: list[Result]) -> str:
    """One object of `result`, compared with the first model's among `results`."""
    score, normalisers = result.score, result.setup.protocol.normalisers
    content = result.about | {
        "normaliser": normalisers[0], "nll": float(score.nll.sum()), "loss": score.loss,
        "tokens": round(float(score.scored.sum())), "words": round(float(score.words.sum())),
        "bytes": round(float(score.bytes.sum())), "documents": len(score.nll),
    }  # fmt: skip
    content |= {name: _finite(score.value(normaliser)) for normaliser, name in _NAMES.items()}
    first = next(other for other in results if other.row == result.row)
    if first is not result:
        content["difference"] = {"from": first.model}
        for normaliser in normalisers:
            mean, error = _difference(first, result, normaliser)
            content["difference"][normaliser] = {"mean": _finite(mean), "standard_error": _finite(error)}
    return json_line(content | result.facts)


def table(results: list[Result], notes: list[str], width: int | None) -> str:
    """The results with a row per protocol and normaliser and a column per model, in lines of `width` characters.

    Below a number stands how much its logarithm is above the first model's.
    """
    from rich.console import Console
    from rich.table import Table

    models = list(dict.fromkeys(result.model for result in results))
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("split", "protocol", "context", "stride", "normaliser"):
        grid.add_column(name, justify="right" if name in ("context", "stride") else "left", no_wrap=True)
    for name in ("tokens", "words", "perplexity") if len(models) == 1 else models:
        grid.add_column(name, justify="right", overflow="fold", min_width=10 if len(models) > 1 else None)
    rows: dict[tuple[str, str, int], list[Result]] = {}
    for result in results:
        rows.setdefault(result.row, []).append(result)
    for (split, protocol, _), compared in rows.items():
        mark = "*" if any(result.setup.scaled for result in compared) else ""
        windows = [_joined(getattr(r.setup, name) for r in compared) + mark for name in ("context", "stride")]
        for normaliser in compared[0].setup.protocol.normalisers:
            grid.add_row(split, protocol, *windows, normaliser, *_cells(compared, models, normaliser))
    lines = []
    if len(models) > 1:
        lines.append(
            f"below a number: ln(perplexity), or bits per byte, above {models[0]}'s; +- the standard error of the "
            "paired difference over the text's documents, or over stretches of 1,024 tokens of a store that has none"
        )
    if any(result.setup.scaled for result in results):
        small = ", ".join(sorted({f"{r.model} ({r.setup.context:,})" for r in results if r.setup.scaled}))
        lines.append(f"*: windows scaled to the model's context, which is below the protocol's 1,024: {small}")
    file = io.StringIO()
    console = Console(file=file, width=width or 10_000, color_system=None, markup=False, emoji=False, highlight=False)
    computed = dict.fromkeys(f"{result.model} in {result.facts['precision']}" for result in results)
    console.print(f"{results[0].text}: perplexity, {', '.join(computed)}", "", grid, "", *lines, *notes, sep="\n")
    return "\n".join(line.rstrip() for line in file.getvalue().split("\n")).rstrip()


def _cells(compared: list[Result], models: list[str], normaliser: str) -> list[str]:
    """The number of each model, and below it the difference from the first model; of one model also the counts."""
    by_model = {result.model: result for result in compared}
    cells = []
    for model in models:
        cell = _value(by_model[model].score.value(normaliser)) if model in by_model else ""
        if cell and model != models[0]:
            mean, error = _difference(by_model[models[0]], by_model[model], normaliser)
            cell += "\n-" if math.isnan(mean) else f"\n{mean:+.4f}"
            cell += "" if math.isnan(error) else f"\n+- {error:.4f}"
        cells.append(cell)
    score = compared[0].score
    return cells if len(models) > 1 else [f"{score.scored.sum():,.0f}", f"{score.words.sum():,.0f}", *cells]


def _difference(first: Result, other: Result, normaliser: str) -> tuple[float, float]:
    """nan per token where the tokens are not the same ones."""
    alike = first.tokenizer == other.tokenizer or normaliser != "tokens"
    paired = alike and len(first.score.nll) == len(other.score.nll)
    return difference(first.score, other.score, normaliser) if paired else (math.nan, math.nan)


def _joined(values: Iterable[int]) -> str:
    return "|".join(f"{value:,}" for value in dict.fromkeys(values))


def _value(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.4f}" if value < 10 else f"{value:,.2f}" if value < 1e6 else f"{value:.3g}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
