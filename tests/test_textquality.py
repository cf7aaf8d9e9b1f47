"""Repetition, variety and distance of texts. Run: pytest tests/test_textquality.py"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.trained import text_store, trained_run
from wikift.base.errors import UserError
from wikift.commands.evaluate import main
from wikift.textquality import measure


def test_figures_worked_out_by_hand() -> None:
    # bigrams of the first: 12 21 12 21, two of four are new; of the second: all three
    found = measure([[1, 2, 1, 2, 1], [3, 4, 5, 6]], [[7, 8]])
    assert (found.texts, found.tokens) == (2, 9)
    assert found.rep_2 == pytest.approx(100 * (1 / 2 + 0) / 2)
    assert found.rep_3 == pytest.approx(100 * (1 / 3 + 0) / 2)
    assert found.rep_4 == 0
    assert found.diversity == pytest.approx(0.75 * (1 - 1 / 6))
    assert found.distinct_1 == pytest.approx(6 / 9)
    assert found.distinct_2 == pytest.approx(5 / 7)
    assert found.divergence == pytest.approx(1), "no token in common"
    assert measure([[1, 2], [2, 1]], [[2, 1, 1, 2]]).divergence == 0, "the same tokens as often"
    # p = (1, 0), q = (1/2, 1/2): the middle is (3/4, 1/4)
    expected = (math.log2(4 / 3) + (0.5 * math.log2(2 / 3) + 0.5 * math.log2(2))) / 2
    assert measure([[1, 1]], [[1, 2]]).divergence == pytest.approx(expected)


def test_texts_too_short_to_have_n_grams() -> None:
    found = measure([[], [1]], [[1]])
    assert (found.rep_2, found.distinct_2, found.diversity) == (0, 0, 1)
    assert measure([[]], [[1]]).divergence == 1


def test_evaluate_generation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = text_store(tmp_path / "store", repeat=40)
    run = trained_run(tmp_path / "run", store.path, config_overrides="n_layer=1,n_head=2,n_embd=16,n_positions=64")
    capsys.readouterr()
    words = [str(run), "--generation", "--split", "train", "--device", "cpu"]
    assert main([*words, "--json"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out)
    model, split = found["generation"]["model"], found["generation"]["split"]
    assert found["settings"]["temperature"] == 0.8
    assert found["settings"]["prompt_tokens"] == 32
    assert model["texts"] == split["texts"] == min(64, store.splits["train"].tokens // 160)
    assert model["divergence"] > split["divergence"], "12 steps do not make a writer"
    assert model["tokens"] > 0
    assert main([*words, "--json"]) == 0
    assert capsys.readouterr().out == out, "the same every time"
    assert main(words) == 0
    table = capsys.readouterr().out
    assert "train itself" in table
    assert "temperature 0.8" in table
    with pytest.raises(UserError, match="--generation needs 320"):
        main([str(run), "--generation", "--split", "test", "--device", "cpu"])
