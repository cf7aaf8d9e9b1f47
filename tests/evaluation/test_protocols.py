"""Protocols: texts, windows, sums. Run: pytest tests/evaluation/test_protocols.py

Against lm_eval, transformers' page and Trainer themselves: tests/agreement.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ranks import run_ranks
from tests.trained import SENTENCES
from wikift.commands.evaluate import main
from wikift.data.sources import Source, open_source
from wikift.evaluation.detokenize import detokenized
from wikift.evaluation.documents import Counts, joined_rows, numbered_rows, page_texts, pages, row_texts
from wikift.evaluation.text import encoded

TEXT = """ ~
 = First = ~
 ~
 A page , of " two " lines ( really ) . ~
 It has 1 @,@ 000 words 's . ~
 = = Not a page = = ~
 ~
 = Second = ~
 ~
 Another page ; the last one . ~
""".replace("~", "")  # each line of WikiText's files ends with a space


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from wikift.data.tokenizer import train

    folder = tmp_path_factory.mktemp("protocols") / "model"
    saved = train(SENTENCES, 320, folder)
    torch.manual_seed(0)
    shape = GPT2Config(
        n_layer=2, n_head=2, n_embd=32, n_positions=32, vocab_size=saved.vocab_size, initializer_range=0.2
    )
    GPT2LMHeadModel(shape).save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "test.txt").write_text(TEXT * 8)
    return tmp_path / "test.txt"


def corpus_of(path: Path) -> Any:
    return open_source(Source(str(path)), cut=False)


def test_pages_are_lm_evals(text: Path) -> None:
    text.write_text(TEXT)
    first, second = (page for page, _ in pages(corpus_of(text), numbered_rows(corpus_of(text), "train")))
    lines = TEXT.split("\n")
    assert first == "\n".join(lines[1:7])
    assert second == "\n".join(lines[7:])  # the last one has the file's end
    counts = Counts()
    made = list(page_texts(corpus_of(text), "train", counts))
    assert [page for page, _, _ in made] == [detokenized(first), detokenized(second)]
    assert counts.words == {0: len(re.split(r"\s+", first)), 1: len(re.split(r"\s+", second))}
    assert counts.bytes == {0: len(first.encode()), 1: len(second.encode())}


def test_words_are_the_papers_and_the_join_is_transformers(text: Path) -> None:
    counts = Counts()
    list(row_texts(corpus_of(text), "train", counts))
    assert counts.words.total() == sum(len(line.split()) + 1 for line in (TEXT * 8).splitlines())
    rows = [line if line.strip() else "" for line in (TEXT * 8).splitlines(keepends=True)]
    assert "".join(part for part, _, _ in joined_rows(corpus_of(text), "train", Counts())) == "\n\n".join(rows)


def test_ids_are_those_of_the_whole_text(model: Path, text: Path) -> None:
    from tokenizers import Tokenizer

    whole = "\n\n".join(line if line.strip() else "" for line in (TEXT * 8).splitlines(keepends=True))
    found = list(encoded(joined_rows(corpus_of(text), "train", Counts()), model / "tokenizer.json", None))
    ids = np.concatenate([piece.ids for piece in found]).tolist()
    assert ids == Tokenizer.from_file(str(model / "tokenizer.json")).encode(whole, add_special_tokens=False).ids
    assert {document for piece in found for document in piece.documents.tolist()} == set(range(16))


def evaluated(model: Path, text: Path, out: Path) -> None:
    import contextlib

    words = [str(model), "--dataset", str(text), "--json", "--quiet", "--device", "cpu"]
    with open(out, "a") as file, contextlib.redirect_stdout(file):
        assert main(words) == 0


def test_the_same_on_one_two_and_three_ranks(model: Path, text: Path, tmp_path: Path) -> None:
    found = []
    for ranks in (1, 2, 3):
        run_ranks(evaluated, ranks, model, text, tmp_path / f"{ranks}.jsonl")
        found.append([json.loads(line) for line in (tmp_path / f"{ranks}.jsonl").read_text().splitlines()])
    alone = found[0]
    assert [result["protocol"] for result in alone] == ["hf-doc", "hf-doc", "blocks", "knn", "paper", "lm-eval"]
    for results in found[1:]:
        assert [r["tokens"] for r in results] == [r["tokens"] for r in alone]
        assert [r["nll"] for r in results] == pytest.approx([r["nll"] for r in alone], rel=1e-6)


def test_one_very_long_line(model: Path, tmp_path: Path) -> None:
    line = 'The Renaissance , " a period " ( of history ) . ' * 1500
    (tmp_path / "line.txt").write_text(line)
    evaluated(model, tmp_path / "line.txt", tmp_path / "out")
    results = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert {result["split"] for result in results} == {"all"}
    assert {result["documents"] for result in results} == {1}
    assert results[-1]["words"] == len(re.split(r"\s+", line))
