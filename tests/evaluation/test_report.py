"""The table. Run: pytest tests/evaluation/test_report.py"""

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
    setup = Setup(PROTOCOLS[protocol], 0, 1024, 512, scaled=False)
    return Result(model, "text", "validation", setup, score, "tokenizer", facts)


@pytest.mark.parametrize(("width", "count"), [(None, 1), (80, 1), (None, 3), (100, 3), (80, 2)])
def test_the_table_fits_and_no_number_is_cut(width: int | None, count: int) -> None:
    results = [result(model, protocol) for model in MODELS[:count] for protocol in ("knn", "lm-eval")]
    shown = table(results, ["a note that is longer than the narrowest of the terminals here, which are 80 wide"], width)
    lines = shown.splitlines()
    assert width is None or max(map(len, lines)) <= width
    numbers = shown.split()
    assert all(str(value) in numbers for value in ("16.08", "28.56", "2.0508", "1.0362"))  # gpt2's by each normaliser
    assert (count == 1) == ("perplexity" in lines[2].split())
    assert (count > 1) == ("+0.0278" in numbers), "e to the power of it is the quotient of the perplexities"
    assert (count == 3) == ("17.00" in numbers)
