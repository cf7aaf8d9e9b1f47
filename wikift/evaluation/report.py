"""What an evaluation shows: a table with a column per model, JSON lines, CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wikift.evaluation.protocols import Setup
from wikift.evaluation.score import Score, difference

if TYPE_CHECKING:
    from rich.table import Table

_LEFT = ("split", "protocol", "normaliser")
_LONGEST_NAME = 16
_OMITTED = ("words", "tokens", "context", "stride")  # in this order
_NAMES = {"tokens": "perplexity", "words": "word_perplexity", "bytes": "byte_perplexity", "bits/byte": "bits_per_byte"}
_CSV = (
    "model", "text", "split", "protocol", "context", "stride", "scaled", "normaliser", "tokens", "words", "bytes",
    "documents", "value", "difference", "standard_error", "precision",
)  # fmt: skip


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
        """What was measured, by the names of JSON and CSV."""
        setup = self.setup
        return {
            "model": self.model, "text": self.text, "split": self.split, "protocol": setup.protocol.name,
            "context": setup.context, "stride": setup.stride, "scaled": setup.scaled,
        }  # fmt: skip


def table(results: list[Result], notes: list[str], width: int | None) -> str:
    """The results with a row per protocol and normaliser and a column per model, in lines of `width` characters.

    Below a number stands how much its logarithm is above the first model's. Columns that --json has too are omitted
    where the terminal is narrow.
    """
    models = list(dict.fromkeys(result.model for result in results))
    heads = models if max(map(len, models)) <= _LONGEST_NAME else [f"[{n}]" for n in range(1, len(models) + 1)]
    heads = heads if len(models) > 1 else ["perplexity"]
    rows = [_row(same, unit, models, heads) for same in _together(results) for unit in _normalisers(same)]
    grid, omitted = _fitting(rows, width)
    precisions = {result.model: result.facts["precision"] for result in results}
    computed = set(precisions.values()) if len(set(precisions.values())) == 1 else map(" in ".join, precisions.items())
    lines = [f"{head}: {model}" for head, model in zip(heads, models, strict=True) if head.startswith("[")]
    if len(models) > 1:
        lines.append(
            f"below a number: ln(perplexity), or bits per byte, above {heads[0]}'s; +- the standard error of the "
            f"paired difference over {len(results[0].score.nll):,} documents"
        )
    if any(result.setup.scaled for result in results):
        small = ", ".join(sorted({f"{r.model} ({r.setup.context:,})" for r in results if r.setup.scaled}))
        lines.append(f"*: windows scaled to the model's context, which is below the protocol's 1,024: {small}")
    if omitted:
        lines.append(f"omitted to fit the terminal: {', '.join(omitted)} (--json and --csv have all)")
    head = f"{results[0].text}: perplexity, {', '.join(computed)}"
    return "\n".join([_drawn(head, width), "", grid, "", _drawn("\n".join(lines + notes), width)]).rstrip()


def _fitting(rows: list[dict[str, str]], width: int | None) -> tuple[str, list[str]]:
    """The rows drawn, and the columns omitted to fit; what is wider even then is left to the terminal to wrap."""
    from rich.table import Table

    for omitted in range(len(_OMITTED) + 1):
        names = [name for name in rows[0] if name not in _OMITTED[:omitted]]
        grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for name in names:
            grid.add_column(name, justify="left" if name in _LEFT else "right", no_wrap=True)
        for row in rows:
            grid.add_row(*(row[name] for name in names))
        drawn = _drawn(grid, None)
        if width is None or max(map(len, drawn.splitlines())) <= width:
            break
    return drawn, list(_OMITTED[:omitted])


def _drawn(what: str | Table, width: int | None) -> str:
    from rich.console import Console

    file = io.StringIO()
    Console(file=file, width=width or 10_000, color_system=None, markup=False, highlight=False).print(what)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def as_json(result: Result, results: list[Result]) -> str:
    """One object of `result`, compared with the first model's among `results`."""
    score = result.score
    content = result.about | {
        "normaliser": _normalisers([result])[0], "nll": float(score.nll.sum()), "loss": score.loss,
        "tokens": round(float(score.scored.sum())), "words": round(float(score.words.sum())),
        "bytes": round(float(score.bytes.sum())), "documents": len(score.nll),
    }  # fmt: skip
    content |= {name: _finite(score.value(normaliser)) for normaliser, name in _NAMES.items()}
    first = _first(result, results)
    if first is not result:
        apart = {normaliser: _difference(first, result, normaliser) for normaliser in _normalisers([result])}
        content["difference"] = {"from": first.model} | {
            normaliser: {"mean": _finite(mean), "standard_error": _finite(error)}
            for normaliser, (mean, error) in apart.items()
        }
    return json.dumps(content | result.facts, ensure_ascii=False)


def as_csv(results: list[Result]) -> str:
    """A line per model, split, protocol and normaliser; `value` is a perplexity, or bits for bits/byte."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(_CSV)
    for result in results:
        first, score = _first(result, results), result.score
        counts = [round(float(part.sum())) for part in (score.scored, score.words, score.bytes)]
        for normaliser in _normalisers([result]):
            apart = _difference(first, result, normaliser) if first is not result else (math.nan, math.nan)
            numbers = ["" if math.isnan(n) else repr(n) for n in (score.value(normaliser), *apart)]
            cells = (*result.about.values(), normaliser, *counts, len(score.nll), *numbers, result.facts["precision"])
            writer.writerow(cells)
    return file.getvalue().rstrip()


# --- rows --------------------------------------------------------------------------------------------------------


def _normalisers(same: list[Result]) -> tuple[str, ...]:
    return same[0].setup.protocol.normalisers


def _together(results: list[Result]) -> list[list[Result]]:
    """The models' results that belong in one row, in the order of the first model."""
    rows: dict[tuple[str, str, int], list[Result]] = {}
    seen: dict[tuple[str, str, str], int] = {}
    for result in results:
        key = result.model, result.split, result.setup.protocol.name
        seen[key] = seen.get(key, 0) + 1  # the first, second ... stride of a protocol, whatever the model's context
        rows.setdefault((*key[1:], seen[key]), []).append(result)
    return list(rows.values())


def _row(same: list[Result], normaliser: str, models: list[str], heads: list[str]) -> dict[str, str]:
    mark = "*" if any(result.setup.scaled for result in same) else ""
    by_model = {result.model: result for result in same}
    row = {
        "split": same[0].split,
        "protocol": same[0].setup.protocol.name,
        "context": _joined([result.setup.context for result in same]) + mark,
        "stride": _joined([result.setup.stride for result in same]) + mark,
        "normaliser": normaliser,
        "tokens": _joined([round(float(result.score.scored.sum())) for result in same]),
        "words": _joined([round(float(result.score.words.sum())) for result in same]),
    }
    for model, head in zip(models, heads, strict=True):
        cell = _value(by_model[model].score.value(normaliser)) if model in by_model else ""
        if cell and model != models[0]:
            cell += "\n" + _apart(*_difference(by_model[models[0]], by_model[model], normaliser))
        row[head] = cell
    return row


def _first(result: Result, results: list[Result]) -> Result:
    """The first model's result in the row of `result`."""
    return next(same[0] for same in _together(results) if result in same)


def _difference(first: Result, other: Result, normaliser: str) -> tuple[float, float]:
    """nan per token where the tokens are not the same ones."""
    alike = first.tokenizer == other.tokenizer or normaliser != "tokens"
    paired = alike and len(first.score.nll) == len(other.score.nll)
    return difference(first.score, other.score, normaliser) if paired else (math.nan, math.nan)


def _joined(values: list[int]) -> str:
    return "|".join(f"{value:,}" for value in dict.fromkeys(values))


def _value(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.4f}" if value < 10 else f"{value:,.2f}" if value < 1e6 else f"{value:.3g}"


def _apart(mean: float, error: float) -> str:
    if math.isnan(mean):
        return "-"
    return f"{mean:+.4f}\n+- {error:.4f}" if not math.isnan(error) else f"{mean:+.4f}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
