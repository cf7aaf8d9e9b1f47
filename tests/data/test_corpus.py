"""The Hub's layout, the demo, and the cut of a validation split. Run: pytest tests/data/test_corpus.py"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.test_sources import opened, rows_of, written
from tests.real import WIKITEXT_MIRROR, needs_data, validation_rows
from wikift.base.errors import UserError
from wikift.data.sources import Source, source_problems

# --- the Hub -----------------------------------------------------------------------------------------------------


@needs_data
def test_a_folder_in_the_hubs_layout() -> None:
    (problem,) = source_problems(Source(str(WIKITEXT_MIRROR)))
    assert problem == (
        "--dataset-config: required, the dataset has several; choose one of wikitext-2-v1, wikitext-103-v1"
    )
    (problem,) = source_problems(Source(str(WIKITEXT_MIRROR), config="wikitext-103"))
    assert problem.endswith("has no such configuration; choose one of wikitext-2-v1, wikitext-103-v1")
    corpus = opened(WIKITEXT_MIRROR, config="wikitext-2-v1")
    assert list(corpus.splits) == ["train", "validation", "test"]
    assert (corpus.config, corpus.rows_are_documents) == ("wikitext-2-v1", False)
    assert rows_of(corpus, "validation") == validation_rows()
    inner = opened(WIKITEXT_MIRROR / "wikitext-2-v1")
    assert (inner.config, inner.rows_are_documents) == ("wikitext-2-v1", False), "known by its name"
    assert rows_of(inner, "test") == rows_of(corpus, "test")
    assert corpus.sizes["validation"] == pytest.approx(sum(len(row.encode()) for row in validation_rows()), rel=0.1)


def test_configurations_of_readme_and_subfolders(tmp_path: Path) -> None:
    for config in ("en", "de"):
        written(
            tmp_path / config, train__jsonl=f'{{"text": "{config}"}}\n', validation__jsonl=f'{{"text": "v{config}"}}\n'
        )
    assert rows_of(opened(tmp_path, config="de"), "train") == ["de"]
    assert opened(tmp_path, config="de").rows_are_documents
    written(tmp_path / "one" / "fr", train__jsonl='{"text": "fr"}\n')
    assert opened(tmp_path / "one").config == "fr", "the only one needs no name"
    readme = (
        "---\nlicense: mit\nconfigs:\n- config_name: only\n  data_files:\n  - split: train\n    path: en/train.jsonl\n"
    )
    (tmp_path / "README.md").write_text(readme + "  - split: validation\n    path: [en/val*, de/val*]\n---\nwords")
    corpus = opened(tmp_path)
    assert corpus.config == "only"
    assert [rows_of(corpus, split) for split in corpus.splits] == [["en"], ["vde", "ven"]]


# --- the demo ----------------------------------------------------------------------------------------------------


def test_the_demo_is_every_topic_once() -> None:
    from pydoc_data.topics import topics

    corpus = opened("demo")
    whole = {split: "".join(rows_of(corpus, split)) for split in corpus.splits}
    for split, share in (("train", 0.9), ("validation", 0.05), ("test", 0.05)):
        size = len(whole[split].encode())
        assert size == corpus.sizes[split]
        assert size / sum(len(text.encode()) for text in whole.values()) == pytest.approx(share, abs=0.01)
    for text in topics.values():
        assert sum(text.removesuffix("\n") + "\n" in part for part in whole.values()) >= 1
    assert sum(map(len, whole.values())) == sum(len(text.removesuffix("\n")) + 1 for text in topics.values())
    assert corpus.revision == sys.version.split()[0]


# --- the cut -----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(count=st.integers(2, 300), fraction=st.floats(0.001, 0.999), seed=st.integers(0, 5), lines=st.booleans())
def test_a_cut_parts_the_rows_exactly(
    tmp_path_factory: pytest.TempPathFactory, count: int, fraction: float, seed: int, lines: bool
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    rows = [f"row {i}" + "\n" * lines for i in range(count)]
    rows[-1] = rows[-1].rstrip()
    path = folder / ("t.txt" if lines else "t.jsonl")
    path.write_text("".join(rows) if lines else "".join(json.dumps({"text": row}) + "\n" for row in rows))
    corpus = opened(path, seed=seed, validation_fraction=fraction)
    train, validation = rows_of(corpus, "train"), rows_of(corpus, "validation")
    assert sorted([*train, *validation]) == sorted(rows)
    number = {row: i for i, row in enumerate(rows)}
    assert [number[row] for row in train] == sorted(number[row] for row in train), "in order"
    assert train
    assert validation
    if not lines:
        assert len(validation) == min(max(1, round(count * fraction)), count - 1)
    elif count > 10:
        assert len(validation) / count == pytest.approx(fraction, abs=0.11)
    assert rows_of(opened(path, seed=seed, validation_fraction=fraction), "validation") == validation
    assert corpus.cut == {"validation_fraction": fraction, "seed": seed}


def test_lines_are_cut_in_stretches_and_documents_one_by_one(tmp_path: Path) -> None:
    written(tmp_path, a__txt="".join(f"{i}\n" for i in range(20_000)))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": str(i)}) + "\n" for i in range(20_000)))
    lines = [int(row) for row in rows_of(opened(tmp_path / "a.txt"), "validation")]
    documents = [int(row) for row in rows_of(opened(tmp_path / "a.jsonl"), "validation")]
    assert len(lines) == len(documents) == 1000, "5 per cent is the default"
    assert sum(b - a > 1 for a, b in itertools.pairwise(lines)) < 10, "ten stretches of a hundred lines"
    assert sum(b - a > 1 for a, b in itertools.pairwise(documents)) > 900
    assert max(documents) > 18_000 > 2_000 > min(documents), "from everywhere"
    other = [int(row) for row in rows_of(opened(tmp_path / "a.jsonl", seed=43), "validation")]
    assert len(set(documents) & set(other)) < 100, "another seed, another sample"


@pytest.mark.parametrize("fraction", [0.05, 0.5, 0.99])
def test_one_row_is_cut_by_length_before_white_space(tmp_path: Path, fraction: float) -> None:
    text = "".join(f" word{i}" for i in range(1000)) + "\n"
    corpus = opened(written(tmp_path, one__txt=text) / "one.txt", validation_fraction=fraction)
    (train,), (validation,) = (rows_of(corpus, split) for split in ("train", "validation"))
    assert train + validation == text
    assert len(validation) / len(text) == pytest.approx(fraction, abs=0.01)
    assert validation.startswith(" word")
    assert corpus.notes == [
        f"one.txt is one row: the last {len(validation):,} of its characters are the validation split"
    ]
    assert rows_of(opened(written(tmp_path, two__txt="a " + "b" * 99) / "two.txt"), "train") == ["a"]


def test_a_file_of_one_long_line_can_be_cut(tmp_path: Path) -> None:
    text = "word " * 1_000_000
    corpus = opened(written(tmp_path, t__txt=text) / "t.txt", validation_fraction=0.5)
    assert [len(rows_of(corpus, split)) for split in ("train", "validation")] == [3, 2]
    assert corpus.notes == [
        f"{tmp_path / 't.txt'}: lines of more than a million characters are divided into several rows"
    ]


def test_a_file_that_grows_between_the_two_readings_of_a_cut(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("a line\n" * 50)
    corpus = opened(path)  # its rows are counted
    with path.open("a") as file:
        file.write("a line\n" * 50)
    with pytest.raises(UserError, match="changed while it was read"):
        rows_of(corpus, "train")
