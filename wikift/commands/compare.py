"""The compare command: what two runs were set to, what they came to, and whether that is equal within a bound."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from wikift.base.command import command_line
from wikift.base.console import print
from wikift.base.errors import EXIT_DONE, UserError
from wikift.commands.report import ROLES_OF_SETTINGS
from wikift.settings.options import parse_all
from wikift.settings.run_fields import CompareSettings
from wikift.watch.record import RunRecord, aligned, differing, read_runs, told_of_damage

_DIFFERENT = 1
_VALUES = {"tokens": "perplexity", "words": "word_perplexity", "bits/byte": "bits_per_byte"}
_MEASURED = ("text", "split", "protocol", "context", "stride", "scaled")

Compared = tuple[str, float, float, float, float]  # name, both values, their difference and its standard error


@told_of_damage()
def main(argv: Sequence[str]) -> int:
    """Run the command; returns 0 where the runs are equal within the bound, else 1."""
    parsed = parse_all(CompareSettings, argv)
    (one, other), within = parsed.checked(_check), parsed.settings.within
    compared = [*_validations(one, other), *_scores(one, other)]
    if not compared:
        raise UserError(
            f"RUN {one.path} {other.path}: have no result on the same text; evaluate both: "
            f"{command_line('evaluate')} {shlex.join([str(one.path), str(other.path)])} --dataset NAME"
        )
    rows = [["setting", one.name, other.name]]
    for role, names in ROLES_OF_SETTINGS.items():
        rows += [[f"{name} ({role})", *map(str, values)] for name, values in differing((one, other), names)]
    print(aligned(rows) if len(rows) > 1 else "no setting differs", end="\n\n")
    rows = [["result", one.name, other.name, "difference", f"within {within:g}"]]
    for name, first, second, difference, error in compared:
        spread = "" if math.isnan(error) else f" +- {error:.4f}"
        same = "yes" if abs(difference) <= within else "no"
        rows.append([name, f"{first:.4f}", f"{second:.4f}", f"{difference:+.4f}{spread}", same])
    print(aligned(rows))
    print(
        "\nThe difference is of losses, of ln(perplexity) or of bits per byte; +- is its standard error over\nthe "
        "text's documents, or stretches of 1,024 tokens. Without: kept as one number, as validation losses are."
    )
    return EXIT_DONE if all(row[-1] == "yes" for row in rows[1:]) else _DIFFERENT


def _check(settings: CompareSettings) -> list[RunRecord]:
    problems = []
    if len(settings.runs) != 2:
        problems.append(
            f"RUN {' '.join(settings.runs)}: must be two runs' folders; {command_line('report')} takes more"
        )
    return read_runs(settings.runs, problems)


def _validations(one: RunRecord, other: RunRecord) -> Iterator[Compared]:
    """The best and the last validation, where both were on the same tokens."""
    alike = _validated_on(one) == _validated_on(other)
    if alike and (first := one.numbers("eval_loss")) and (second := other.numbers("eval_loss")):
        lowest = [min(loss for _, loss in pairs) for pairs in (first, second)]
        for name, (before, after) in (("best", lowest), ("last", [first[-1][1], second[-1][1]])):
            yield f"validation loss, {name}", before, after, after - before, math.nan


def _validated_on(run: RunRecord) -> tuple[Any, ...]:
    splits = (run.config.get("store") or {}).get("splits") or {}
    return _tokenizer(run), splits.get("validation", {}).get("sha256"), run.settings.get("max_eval_samples")


def _tokenizer(run: RunRecord) -> Any:
    return ((run.config.get("store") or {}).get("tokenizer") or {}).get("fingerprint")


def _scores(one: RunRecord, other: RunRecord) -> Iterator[Compared]:
    """What wikift evaluate measured of both in the same way; per word where the tokens are not the same ones."""
    import numpy as np

    from wikift.evaluation.score import Score, difference

    theirs = {tuple(score[name] for name in _MEASURED): score for score in other.scores}
    for score in one.scores:
        twin = theirs.get(tuple(score[name] for name in _MEASURED))
        if twin is None:
            continue
        unit = (
            "words" if score["normaliser"] == "tokens" and _tokenizer(one) != _tokenizer(other) else score["normaliser"]
        )
        first, second = (float(entry[_VALUES[unit]] or math.nan) for entry in (score, twin))
        mean, error = (second - first if unit == "bits/byte" else math.log(second / first)), math.nan
        kept = [entry["by_document"] for entry in (score, twin) if "by_document" in entry]
        if len(kept) == 2 and score["documents"] == twin["documents"]:
            both = [Score(**{name: np.array(counts) for name, counts in counted.items()}) for counted in kept]
            mean, error = difference(both[0], both[1], unit)
        if not math.isnan(mean):
            name = ", ".join(
                map(str, (*(score[key] for key in _MEASURED[:3]), f"stride {score['stride']}, per {unit}"))
            )
            yield name, first, second, mean, error
