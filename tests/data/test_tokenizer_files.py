# python -m pytest tests/data/test_tokenizer_files.py
"""GPT-2's tokenizer files are copied without transformers, to the same end; whatever else could act is left to it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.data.test_tokenizer import PROBE, TEXTS
from tests.real import GPT2_TOKENIZER, ROOT, needs_data
from wikift.base.errors import UserError
from wikift.data import tokenizer
from wikift.data.tokenizer import CONFIG, EOS, FILE


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tokenizer.train(TEXTS, 320, tmp_path / "mine").folder


def edit(name: str, change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """A change of one of the JSON files."""

    def act(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return act


def config(**values: Any) -> Callable[[Path], None]:
    return edit(CONFIG, lambda content: content.update(values))


def top(**values: Any) -> Callable[[Path], None]:
    return edit(FILE, lambda content: content.update(values))


def bpe(**values: Any) -> Callable[[Path], None]:
    return edit(FILE, lambda content: content["model"].update(values))


def pair_of_files(folder: Path) -> None:
    model = json.loads((folder / FILE).read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "".join(f"{a} {b}\n" for a, b in model["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges)
    (folder / FILE).unlink()


def older_spelling(folder: Path) -> None:
    """As in the repository gpt2 of the Hub: merges in one string, the class told by the model's type."""
    edit(FILE, lambda content: content["model"].update(merges=[" ".join(pair) for pair in content["model"]["merges"]]))(
        folder
    )
    edit(FILE, lambda content: content["added_tokens"][0].update(normalized=True))(folder)
    (folder / CONFIG).write_text('{"model_max_length": 1024}')
    (folder / "config.json").write_text('{"model_type": "gpt2"}')


def resaved(folder: Path) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)


def other_end(folder: Path) -> None:
    for file in (FILE, CONFIG):
        (folder / file).write_text((folder / file).read_text().replace(EOS, "<end>"))


PLAIN = {
    "as it was trained": lambda folder: None,
    "vocab.json and merges.txt": pair_of_files,
    "the Hub's gpt2": older_spelling,
    "saved by transformers": resaved,
    "another end of text": other_end,
    "another decoder": top(decoder={"type": "Fuse"}),
    "settings without effect": config(pad_token=None, errors="replace", model_max_length=77),
}


def same_as_by_transformers(source: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    stock = AutoTokenizer.from_pretrained(source)
    stock.save_pretrained(tmp_path / "stock")
    with mock.patch.object(tokenizer, "_by_transformers", side_effect=AssertionError("is not needed")):
        saved = tokenizer.load_tokenizer(str(source), tmp_path / "copy")
    assert saved.fingerprint == tokenizer.tokenizer_fingerprint(tmp_path / "stock")
    assert saved.fingerprint == tokenizer.tokenizer_fingerprint(tmp_path / "copy")
    assert (saved.eos_token_id, saved.vocab_size) == (stock.eos_token_id, len(stock))
    copy = AutoTokenizer.from_pretrained(tmp_path / "copy")
    assert type(copy) is type(stock)
    for name in ("special_tokens_map", "model_max_length", "padding_side", "truncation_side", "add_prefix_space"):
        assert getattr(copy, name) == getattr(stock, name), name
    for text in [PROBE, *TEXTS[:5], ""]:
        ids = stock(text)["input_ids"]
        assert copy(text)["input_ids"] == ids
        assert copy.decode(ids) == stock.decode(ids)


@pytest.mark.parametrize("kind", PLAIN)
def test_a_plain_copy_is_that_of_transformers(kind: str, folder: Path, tmp_path: Path) -> None:
    PLAIN[kind](folder)
    same_as_by_transformers(folder, tmp_path)


@needs_data
def test_gpt2s_own_files(tmp_path: Path) -> None:
    same_as_by_transformers(GPT2_TOKENIZER, tmp_path)


def add_token(content: dict[str, Any]) -> None:
    content["added_tokens"].append({**content["added_tokens"][0], "id": 320, "content": "<pad>"})


LEFT = {
    "a token more": edit(FILE, add_token),
    "a pad token": config(pad_token="<pad>"),
    "another beginning": config(bos_token="a"),
    "an end that strips": config(eos_token={"content": EOS, "lstrip": True}),
    "an added end that strips": edit(FILE, lambda content: content["added_tokens"][0].update(rstrip=True)),
    "a space before": config(add_prefix_space=True),
    "a beginning put before": config(add_bos_token=True),
    "another class": config(tokenizer_class="PreTrainedTokenizerFast"),
    "no class": edit(CONFIG, lambda content: content.pop("tokenizer_class")),  # type: ignore[arg-type, return-value]
    "a setting unheard of": config(chat_template="{{ messages }}"),
    "special_tokens_map.json": lambda folder: (folder / "special_tokens_map.json").write_text("{}"),
    "another model": lambda folder: (folder / "config.json").write_text('{"model_type": "opt"}'),
    "a normalizer": top(normalizer={"type": "NFC"}),
    "other words": top(pre_tokenizer={"type": "Whitespace"}),
    "something after": top(
        post_processor={"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {"a": {}}}
    ),
    "dropout": bpe(dropout=0.1),
    "another kind": bpe(type="WordLevel"),
    "merges of nothing": bpe(merges=[["zz", "zz"]]),
    "not JSON": lambda folder: (folder / FILE).write_text("{"),
    "a list": lambda folder: (folder / FILE).write_text("[]"),
}


@pytest.mark.parametrize("kind", LEFT)
def test_whatever_else_could_act_is_left_to_transformers(kind: str, folder: Path, tmp_path: Path) -> None:
    LEFT[kind](folder)
    with (
        mock.patch.object(tokenizer, "_by_transformers", side_effect=UserError("by transformers")),
        pytest.raises(UserError, match="by transformers"),
    ):
        tokenizer.load_tokenizer(str(folder), tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_preparing_imports_no_more_than_it_needs(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("".join(TEXTS))
    words = ["--dataset", tmp_path / "t.txt", "--tokenizer", folder, "--out", tmp_path / "out", "--quiet"]
    code = (
        "import sys; from wikift.commands.prepare import main; main(sys.argv[1:]);"
        "print(*{'torch', 'transformers', 'datasets', 'pandas'} & {*sys.modules})"
    )
    command = [sys.executable, "-c", code, *map(str, words)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=100)
    assert ran.stdout.split() == []
