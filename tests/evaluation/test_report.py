"""The table on terminals of any width. Run: pytest tests/evaluation/test_report.py"""

from __future__ import annotations

import numpy as np
import pytest

from wikift.evaluation.protocols import PROTOCOLS, Setup
from wikift.evaluation.report import Result, table
from wikift.evaluation.score import Score

MODELS = ("gpt2", "runs/gpt2-wikitext-103-v1/hf", "distilgpt2")


def result(model: str, protocol: str) -> Result:
    nll = np.array([300.0, 200.0]) * (1 + MODELS.index(model) / 100)
    score = Score(nll, *(np.array(counts, np.float64) for counts in ([100, 80], [101, 80], [80, 70], [400, 300])))
    facts = {"precision": "fp32", "processes": 1, "seconds": 1.0}
    setup = Setup(PROTOCOLS[protocol], 1024, 512, scaled=False)
    return Result(model, "text", "validation", setup, score, "tokenizer", facts)


@pytest.mark.parametrize(("width", "count"), [(None, 1), (60, 1), (45, 1), (None, 3), (100, 3), (64, 3)])
def test_the_table_fits_and_no_number_is_cut(width: int | None, count: int) -> None:
    results = [result(model, protocol) for model in MODELS[:count] for protocol in ("knn", "lm-eval")]
    shown = table(results, ["a note that is longer than the narrowest of the terminals here"], width)
    lines = shown.splitlines()
    assert width is None or max(map(len, lines)) <= width
    numbers = shown.split()
    assert all(str(value) in numbers for value in ("16.08", "28.56", "2.0508", "1.0362"))  # gpt2's by each normaliser
    assert (count == 3) == ("+0.0278" in numbers), "e to the power of it is the quotient of the perplexities"
    if count == 3:
        assert all(name in numbers for name in ("16.54", "17.00", "distilgpt2", MODELS[1]))
    full = {"context", "stride", "tokens", "words"} <= set(next(line.split() for line in lines if "normaliser" in line))
    assert full != ("omitted to fit" in shown)
    assert full or width is not None
