"""Splits of rows, and a validation split cut from the train rows by seed.

Each call of a split reads it again from the start, in bounded memory. Of documents single rows are cut, of line files
whole stretches of lines, since neighbouring lines in both splits would leak. How many are cut is exact; which ones is a
function of the seed, the number of rows and the fraction. It costs one more reading, to count, and a byte a document.
The only row of a text is cut by length.
"""

from __future__ import annotations

import dataclasses
import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from wikift.base.errors import UserError
from wikift.data.texts import Texts
from wikift.data.user_files import CHANGED

_SEARCHED = 10_000  # characters before the place of a cut by length where white space is looked for
_STRETCHES = 10  # of lines, at least, on the smaller side of a cut: a sample of the text and not one chapter of it

Rows = Callable[[], Iterator[Texts]]


@dataclass(frozen=True)
class Corpus:
    """Splits of rows: each text is one. `sizes` are bytes of text, about, where they are known beforehand; `notes` are
    for the user, and reading a split may add to them."""

    name: str
    config: str | None
    revision: str
    rows_are_documents: bool
    splits: dict[str, Rows]
    sizes: dict[str, int | None]
    cut: dict[str, float | int] | None = None
    notes: list[str] = field(default_factory=list)

    def texts(self, split: str) -> Iterator[str]:
        return (text for texts in self.splits[split]() for text in texts)


def cut_validation(corpus: Corpus, fraction: float, seed: int) -> Corpus:
    """Cut `fraction` of the train rows off as validation; neither side is empty, save that one word stays whole."""
    train = corpus.splits["train"]
    rows = sum(len(texts) for texts in train())
    if rows < 2:
        return _cut_by_length(corpus, fraction, seed)
    stretches = math.ceil(_STRETCHES / min(fraction, 1 - fraction))
    units = rows if corpus.rows_are_documents else min(rows, stretches)
    taken = np.fromiter(_chosen(units, fraction, seed), np.bool_, units)

    def part(validation: bool) -> Rows:
        def batches() -> Iterator[Texts]:
            row = 0  # that comes next
            for batch in train():
                unit = np.arange(row, row + len(batch)) * units // rows
                row += len(batch)
                if row > rows:
                    raise UserError(f"{corpus.name}: {CHANGED}")
                kept = batch.kept(taken[unit] == validation)
                if len(kept):
                    yield kept

        return batches

    size = corpus.sizes["train"]
    parts = {"train": 1 - fraction, "validation": fraction}
    return dataclasses.replace(
        corpus,
        splits={**corpus.splits, "train": part(False), "validation": part(True)},
        sizes={**corpus.sizes, **{name: None if size is None else int(size * share) for name, share in parts.items()}},
        cut={"validation_fraction": fraction, "seed": seed},
    )


def _cut_by_length(corpus: Corpus, fraction: float, seed: int) -> Corpus:
    """Cut the end of the only row off, before white space."""
    text = "".join(corpus.texts("train"))
    middle, gap = int(len(text) * (1 - fraction)), re.compile(r"(?<=\S)\s+(?=\S)")
    near = [match.start() for match in gap.finditer(text, max(0, middle - _SEARCHED), middle + 1)][-1:]
    near += [match.start() for match in (gap.search(text, middle), gap.search(text)) if match]
    if not near:
        note = f"{corpus.name} has {'one word' if text.strip() else 'no text'}, so no validation split is cut from it"
        return dataclasses.replace(corpus, notes=[*corpus.notes, note])
    parts = {"train": text[: near[0]], "validation": text[near[0] :]}
    note = f"{corpus.name} is one row: the last {len(parts['validation']):,} of its characters are the validation split"
    return dataclasses.replace(
        corpus,
        splits={**corpus.splits, **{name: partial(_rows, part) for name, part in parts.items()}},
        sizes={**corpus.sizes, **{name: len(part.encode()) for name, part in parts.items()}},
        cut={"validation_fraction": fraction, "seed": seed},
        notes=[*corpus.notes, note],
    )


def _rows(text: str) -> Iterator[Texts]:
    yield Texts.of((text,))


def _chosen(units: int, fraction: float, seed: int) -> Iterator[bool]:
    """For each of `units` whether it is cut off: `fraction` of them, at least one, not all.

    Selection sampling (Knuth, TAOCP 2, 3.4.2, algorithm S): exact, in one pass.
    """
    left = min(max(1, round(units * fraction)), units - 1)
    source = random.Random(seed)
    for remaining in range(units, 0, -1):
        take = source.random() * remaining < left
        left -= take
        yield take
