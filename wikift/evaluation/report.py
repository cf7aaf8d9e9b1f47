"""What an evaluation shows: a table with a column per model, JSON lines, CSV."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
import sys
from dataclasses import dataclass
from typing import Any

from wikift.evaluation.score import Measured, difference

_KEYS = ("split", "protocol", "stride", "normaliser")  # repeated where a table is too wide for the terminal
_LEFT = ("split", "protocol", "normaliser")
_LONGEST_NAME = 16
_CSV = (
    "model", "text", "split", "protocol", "context", "stride", "scaled", "normaliser", "tokens", "words", "bytes",
    "documents", "value", "difference", "standard_error",
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """One model on one split by one protocol. `scaled`: in smaller windows than the protocol's."""

    model: str
    text: str
    split: str
    protocol: str
    normalisers: tuple[str, ...]
    context: int
    stride: int
    scaled: bool
    measured: Measured
    tokenizer: str
    facts: dict[str, Any]


def table(results: list[Result], notes: list[str]) -> str:
    """The results with a row per protocol and normaliser and a column per model; as wide as the terminal allows."""
    models = list(dict.fromkeys(result.model for result in results))
    heads = _heads(models)
    rows = [_row(same, normaliser, models, heads) for same in _together(results) for normaliser in same[0].normalisers]
    columns = {name: [name, *(row[name] for row in rows)] for name in rows[0]}
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    lines = [f"{results[0].text}: perplexity, {results[0].facts['precision']}", ""]
    for part in _fitting(columns, width):
        lines += [*_lines({name: columns[name] for name in part}), ""]
    if len(models) > 1:
        lines += [f"{head}: {model}" for head, model in zip(heads, models, strict=True) if head != model]
        lines.append(
            f"-{heads[0]}: ln(perplexity), or bits per byte, above {heads[0]}'s; +- the standard error of the paired "
            f"difference over {len(results[0].measured.nll):,} documents"
        )
    if any(result.scaled for result in results):
        small = ", ".join(sorted({f"{r.model} ({r.context:,})" for r in results if r.scaled}))
        lines.append(f"*: windows scaled to the model's context, which is below the protocol's 1,024: {small}")
    return "\n".join(lines + notes).rstrip()


def as_json(result: Result, found: list[Result]) -> str:
    """One object of `result`, compared with the first model's among `found`."""
    measured = result.measured
    nll, scored = float(measured.nll.sum()), float(measured.scored.sum())
    content: dict[str, Any] = {
        name: getattr(result, name) for name in ("model", "text", "split", "protocol", "context", "stride", "scaled")
    }
    content |= {"normaliser": result.normalisers[0], "nll": nll, "loss": nll / scored, "tokens": round(scored)}
    content |= {"words": round(float(measured.words.sum())), "bytes": round(float(measured.bytes.sum()))}
    content |= {"documents": len(measured.nll)}
    names = {
        "tokens": "perplexity",
        "words": "word_perplexity",
        "bytes": "byte_perplexity",
        "bits/byte": "bits_per_byte",
    }
    content |= {name: _finite(measured.value(normaliser)) for normaliser, name in names.items()}
    first = _first(result, found)
    if first is not result:
        content["difference"] = {
            "from": first.model,
            **{
                normaliser: dict(zip(("mean", "standard_error"), map(_finite, _difference(first, result, normaliser)),
                                     strict=True))
                for normaliser in result.normalisers
            },
        }  # fmt: skip
    return json.dumps(content | result.facts, ensure_ascii=False)


def as_csv(results: list[Result]) -> str:
    """A line per model, split, protocol and normaliser; `value` is a perplexity, or bits for bits/byte."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(_CSV)
    for result in results:
        first, found = _first(result, results), result.measured
        counts = [round(float(part.sum())) for part in (found.scored, found.words, found.bytes)]
        for normaliser in result.normalisers:
            apart = _difference(first, result, normaliser) if first is not result else (math.nan, math.nan)
            words = (result.model, result.text, result.split, result.protocol, result.context, result.stride)
            numbers = (found.value(normaliser), *apart)
            cells = (*words, result.scaled, normaliser, *counts, len(found.nll))
            writer.writerow((*cells, *("" if math.isnan(number) else repr(number) for number in numbers)))
    return file.getvalue().rstrip()


# --- rows and columns --------------------------------------------------------------------------------------------


def _heads(models: list[str]) -> list[str]:
    """The models' columns: their names, letters where they are long or there is one only."""
    if len(models) == 1:
        return ["perplexity"]
    if max(map(len, models)) <= _LONGEST_NAME:
        return models
    return [f"[{number}]" for number in range(1, len(models) + 1)]


def _together(results: list[Result]) -> list[list[Result]]:
    """The models' results that belong in one row, in the order of the first model."""
    rows: dict[tuple[str, str, int], list[Result]] = {}
    seen: dict[tuple[str, str, str], int] = {}
    for result in results:
        key = result.model, result.split, result.protocol
        seen[key] = seen.get(key, 0) + 1  # the first, second ... stride of a protocol, whatever the model's context
        rows.setdefault((result.split, result.protocol, seen[key]), []).append(result)
    return list(rows.values())


def _row(same: list[Result], normaliser: str, models: list[str], heads: list[str]) -> dict[str, str]:
    mark = "*" if any(result.scaled for result in same) else ""
    row = {
        "split": same[0].split,
        "protocol": same[0].protocol,
        "context": _joined([result.context for result in same]) + mark,
        "stride": _joined([result.stride for result in same]) + mark,
        "normaliser": normaliser,
        "tokens": _joined([round(float(result.measured.scored.sum())) for result in same]),
        "words": _joined([round(float(result.measured.words.sum())) for result in same]),
    }
    by_model = {result.model: result for result in same}
    for model, head in zip(models, heads, strict=True):
        row[head] = _value(by_model[model].measured.value(normaliser)) if model in by_model else ""
    for model, head in list(zip(models, heads, strict=True))[1:]:
        row[f"{head} -{heads[0]}"] = (
            _apart(*_difference(by_model[models[0]], by_model[model], normaliser)) if model in by_model else ""
        )
    return row


def _first(result: Result, found: list[Result]) -> Result:
    """The first model's result in the row of `result`."""
    return next(same[0] for same in _together(found) if result in same)


def _difference(first: Result, other: Result, normaliser: str) -> tuple[float, float]:
    """nan per token where the tokens are not the same ones."""
    alike = first.tokenizer == other.tokenizer or normaliser != "tokens"
    same = len(first.measured.nll) == len(other.measured.nll)
    return difference(first.measured, other.measured, normaliser) if alike and same else (math.nan, math.nan)


def _joined(values: list[int]) -> str:
    return "|".join(f"{value:,}" for value in dict.fromkeys(values))


def _value(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.4f}" if value < 10 else f"{value:,.2f}" if value < 1e6 else f"{value:.3g}"


def _apart(mean: float, error: float) -> str:
    if math.isnan(mean):
        return "-"
    return f"{mean:+.4f} +- {error:.4f}" if not math.isnan(error) else f"{mean:+.4f}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _fitting(columns: dict[str, list[str]], width: int | None) -> list[list[str]]:
    """The columns in one table, or in several that fit, each with the key columns in front."""

    def size(names: list[str]) -> int:
        return sum(max(map(len, columns[name])) + 2 for name in names) - 2

    parts: list[list[str]] = [[]]
    for name in columns:
        if width is not None and parts[-1] and size([*parts[-1], name]) > width:
            parts.append(list(_KEYS))
        parts[-1].append(name)
    return parts


def _lines(columns: dict[str, list[str]]) -> list[str]:
    cells = []
    for name, column in columns.items():
        width = max(map(len, column))
        cells.append([f"{cell:<{width}}" if name in _LEFT else f"{cell:>{width}}" for cell in column])
    return ["  ".join(row).rstrip() for row in zip(*cells, strict=True)]
