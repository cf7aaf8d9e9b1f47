"""The protocols against the programs that they are named after, on WikiText's real validation text.

make test-agreement; or pytest tests/agreement, where each test skips itself without its packages (requirements.txt).
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.real import GPT2_TOKENIZER, needs_data, validation_rows
from wikift.commands.evaluate import main
from wikift.evaluation.detokenize import detokenized

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
pytestmark = [pytest.mark.filterwarnings("ignore"), needs_data]  # the originals' warnings are not ours
# Heads of articles of the validation split, enough for several windows and several pages; 0 is all of it
ROWS = int(os.environ.get("WIKIFT_AGREEMENT_ROWS", "120"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("agreement")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    """A GPT-2 of random weights, 2 layers, 64 wide, weights large enough that context matters; with its tokenizer."""
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    made = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=64, initializer_range=0.2))
    made.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(GPT2_TOKENIZER).save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def text(folder: Path) -> Path:
    """A dataset in the Hub's layout: rows of the real validation split, from two articles where not from all."""
    import pyarrow as pa
    import pyarrow.parquet

    rows = validation_rows()
    if ROWS:
        titles = [number for number, row in enumerate(rows) if row.startswith(" = ") and not row.startswith(" = =")]
        second = next(number for number in titles if number > ROWS)
        rows = [*rows[: ROWS // 2], "", *rows[second : second + ROWS // 2]]
    place = folder / "text" / "wikitext-2-v1"
    place.mkdir(parents=True)
    pa.parquet.write_table(pa.table({"text": rows}), place / "validation-00000-of-00001.parquet")
    return folder / "text"


def rows_of(text: Path) -> list[str]:
    import pyarrow.parquet

    rows: list[str] = pyarrow.parquet.read_table(next(text.glob("*/validation-*")))["text"].to_pylist()
    return rows


def measured(model: Path, text: Path, capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    line = [str(model), "--dataset", str(text), "--split", "validation", "--json", "--quiet"]
    assert main([*line, "--device", "cpu", *words]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def original_pages(rows: list[str]) -> list[dict[str, str]]:
    """What EleutherAI/wikitext_document_level holds, made of the file that the Hub's rows were made of."""
    lines = "".join(row or " \n" for row in rows).split("\n")
    pages: list[str] = []
    page: list[str] = []
    for line in lines:
        plain = line.replace("= = =", "===").replace("= =", "==").strip()
        if plain.startswith("= ") and plain.endswith(" ="):
            if "\n".join(page).strip():
                pages.append("\n".join(page))
            page = []
        page.append(line)
    return [{"page": page} for page in [*pages, "\n".join(page)]]


def test_lm_eval(model: Path, text: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: make test-agreement")
    import lm_eval
    import yaml
    from lm_eval.models.huggingface import HFLM

    own = Path(lm_eval.__file__).parent / "tasks" / "wikitext"  # the task's own functions and settings, local data
    task = folder / "task"
    task.mkdir()
    (task / "preprocess_wikitext.py").write_text((own / "preprocess_wikitext.py").read_text())
    with open(task / "pages.jsonl", "w") as file:
        file.writelines(json.dumps(page) + "\n" for page in original_pages(rows_of(text)))
    settings = (own / "wikitext.yaml").read_text()
    local = yaml.safe_dump({"data_files": {"validation": str(task / "pages.jsonl")}})
    for before, after in (
        ("task: wikitext", "task: wikitext_local"),
        ("dataset_path: EleutherAI/wikitext_document_level", "dataset_path: json"),
        ("dataset_name: wikitext-2-raw-v1", f"dataset_kwargs: {json.dumps(yaml.safe_load(local))}"),
        ("training_split: train\n", ""),
        ("test_split: test\n", ""),
    ):
        assert before in settings
        settings = settings.replace(before, after)
    (task / "wikitext_local.yaml").write_text(settings)

    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(task), include_defaults=False)
    lm = HFLM(pretrained=str(model), device="cpu", dtype="auto", batch_size=4)
    theirs = lm_eval.simple_evaluate(lm, tasks=["wikitext_local"], task_manager=manager, bootstrap_iters=0)
    numbers = theirs["results"]["wikitext_local"]
    (ours,) = measured(model, text, capsys, "--protocol", "lm-eval")
    for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        print(name, numbers[f"{name},none"], ours[name])
        assert ours[name] == pytest.approx(numbers[f"{name},none"], rel=1e-5)


@given(st.lists(st.sampled_from([*"aN9 '\"()[]{}=.,:;!?@-\n/s°", " @-@ ", "= = ", " 's", "s '"])).map("".join))
def test_the_detokenizer_is_theirs(page: str) -> None:
    theirs = pytest.importorskip("lm_eval.tasks.wikitext.preprocess_wikitext", reason="lm_eval is not installed")
    assert detokenized(page) == theirs.wikitext_detokenizer({"page": page})


@pytest.mark.parametrize("stride", [1024, 512])
def test_the_page_on_perplexity(model: Path, text: Path, capsys: pytest.CaptureFixture[str], stride: int) -> None:
    """The loop of transformers' page "Perplexity of fixed-length models", as it says."""
    import torch
    from transformers import AutoTokenizer, GPT2LMHeadModel

    theirs = GPT2LMHeadModel.from_pretrained(model).eval()
    ids = AutoTokenizer.from_pretrained(model)("\n\n".join(rows_of(text)), return_tensors="pt").input_ids
    total, count, before = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + 1024, ids.shape[1])
        inputs = ids[:, begin:end]
        labels = inputs.clone()
        labels[:, : -(end - before)] = -100
        with torch.no_grad():
            loss = theirs(inputs, labels=labels).loss
        valid = int((labels != -100).sum()) - 1  # "due to internal label shift"
        total, count, before = total + float(loss) * valid, count + valid, end
        if end == ids.shape[1]:
            break
    (ours,) = measured(model, text, capsys, "--protocol", "hf-doc", "--stride", str(stride))
    print("perplexity", math.exp(total / count), ours["perplexity"], "tokens", count, ours["tokens"])
    assert ours["tokens"] == count
    assert ours["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-6)


def test_trainer_on_the_blocks_of_run_clm(
    model: Path, text: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a text of so many tokens that run_clm has no remainder to drop, both score the same ones."""
    pytest.importorskip("accelerate", reason="accelerate, which Trainer needs, is not installed: make test-agreement")
    import pyarrow as pa
    import pyarrow.parquet
    from transformers import AutoTokenizer, GPT2LMHeadModel, Trainer, TrainingArguments, default_data_collator

    tokenizer = AutoTokenizer.from_pretrained(model)
    whole = sum(len(tokenizer(row).input_ids) for row in rows_of(text)[:999]) // 1024 * 1024
    ids: list[int] = []
    kept: list[str] = []
    for row in rows_of(text):
        found = tokenizer(row).input_ids[: whole - len(ids)]
        kept.append(tokenizer.decode(found))
        ids += found
    assert [i for row in kept for i in tokenizer(row).input_ids] == ids
    assert len(ids) == whole > 4096
    blocks = [{"input_ids": ids[at : at + 256], "labels": ids[at : at + 256]} for at in range(0, whole, 256)]
    arguments = TrainingArguments(str(folder / "trainer"), per_device_eval_batch_size=4, report_to=[], use_cpu=True)
    trainer = Trainer(
        GPT2LMHeadModel.from_pretrained(model), arguments, eval_dataset=blocks, data_collator=default_data_collator
    )
    loss = trainer.evaluate()["eval_loss"]
    place = folder / "whole" / "wikitext-2-v1"
    place.mkdir(parents=True)
    pa.parquet.write_table(pa.table({"text": kept}), place / "validation-00000-of-00001.parquet")
    (ours,) = measured(model, folder / "whole", capsys, "--protocol", "blocks", "--context", "256")
    print("loss", loss, ours["loss"])
    assert ours["tokens"] == whole // 256 * 255
    # This Trainer divides by all 256 labels of a block, though its first one is never predicted: the sums are compared.
    assert ours["nll"] == pytest.approx(loss * whole, rel=1e-6)
