"""wikift prepare as its users meet it: stores, odd files, wrong settings."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tests.real import GPT2_TOKENIZER, ROOT, WIKITEXT_MIRROR, needs_data
from wikift.base.errors import UserError
from wikift.commands import main as exits
from wikift.commands import prepare
from wikift.data import prepare as preparing
from wikift.data.store import TokenStore, open_store


def run(*words: Any) -> tuple[int, list[str]]:
    """The exit code of prepare in this process, and the problems it tells."""
    try:
        return prepare.main([str(word) for word in words]), []
    except UserError as error:
        return exits.EXIT_USER, list(error.problems)


def stored(out: Path, *words: Any) -> TokenStore:
    assert run("--out", out, "--quiet", *words) == (0, [])
    return open_store(out, verify=True)


def text_of(store: TokenStore, split: str) -> str:
    tokenizer = Tokenizer.from_file(str(store.path / "tokenizer" / "tokenizer.json"))
    text: str = tokenizer.decode(store.tokens(split).tolist(), skip_special_tokens=False)
    return text


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# --- stores ------------------------------------------------------------------------------------------------------


@needs_data
def test_the_mirror_has_its_known_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "data" / "wt2"
    words = ["--dataset", WIKITEXT_MIRROR, "--dataset-config", "wikitext-2-v1", "--tokenizer", GPT2_TOKENIZER]
    words += ["--out", out]
    assert run(*words) == (0, [])
    printed = capsys.readouterr()
    splits = ("train", "validation", "test")
    assert printed.err == "".join(f"{split}: {split}-00000-of-00001.parquet\n" for split in splits)
    table = [line.split() for line in printed.out.splitlines()]
    assert table[0] == ["split", "rows", "tokens", "words", "bytes"]
    assert table[2] == ["validation", "3,760", "256,061", "217,646", "1,119,083"]
    assert printed.out.endswith(f"{out}: ready. Next:\n  wikift train --data {out}\n")
    store = open_store(out, verify=True)
    assert list(store.splits) == ["train", "validation", "test"]
    assert (store.dtype, store.vocab_size, store.eos_token_id) == ("uint16", 50257, 50256)
    record = store.record
    assert record["dataset"] == "wikitext-mirror"
    assert record["dataset_config"] == "wikitext-2-v1"
    assert record["revision"].startswith("sha256:")
    assert (record["rows_are_documents"], record["append_eos"], record["validation_fraction"]) == (False, False, None)
    assert str(tmp_path) not in json.dumps(record), "no paths of this machine"
    names = ["store.json", "tokenizer", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"]
    assert everything(out) == sorted([*names, *(f"{split}.bin" for split in store.splits)])
    assert [path.name for path in out.parent.iterdir()] == ["wt2"]

    assert run(*words, "--verify") == (0, [])
    printed = capsys.readouterr()
    assert printed.err == f"{out} already exists, with the same recipe\n"
    assert f"{out}: every checksum is right" in printed.out
    assert run(*words, "--append-eos") == (2, [
        f"{out}: was made with other settings (append_eos False in the store, True requested); remove the folder, "
        "or make another store with wikift prepare --out DIR"
    ])  # fmt: skip


def test_the_demo_and_the_number_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wikift.data import encode

    monkeypatch.setattr(encode, "CHUNK_CHARACTERS", 20_000)  # so that processes are started
    words = ["--dataset", "demo", "--tokenizer", "train:600"]
    stores = [stored(tmp_path / str(n), *words, "--workers", n) for n in (1, 2, 3)]
    assert len({store.fingerprint for store in stores}) == 1
    assert len({json.dumps(store.record) for store in stores}) == 1
    for split in ("train", "validation", "test"):
        assert "\n" in text_of(stores[0], split)
        assert stores[0].splits[split].bytes == len(text_of(stores[0], split).encode())
    assert stores[0].vocab_size == 600


def test_documents_end_with_end_of_text(tmp_path: Path) -> None:
    source = tmp_path / "d.jsonl"
    source.write_text("".join(json.dumps({"body": f"text number {i}"}) + "\n" for i in range(20)))
    words = ["--dataset", source, "--text-column", "body", "--tokenizer", "train:300"]
    with_eos = stored(tmp_path / "a", *words)
    assert with_eos.record["append_eos"] is True
    assert text_of(with_eos, "train").count("<|endoftext|>") == 19
    assert text_of(with_eos, "train").endswith("<|endoftext|>")
    assert with_eos.splits["validation"].rows == 1
    without = stored(tmp_path / "b", *words, "--no-append-eos")
    assert without.record["append_eos"] is False
    assert text_of(without, "train") == text_of(with_eos, "train").replace("<|endoftext|>", "")
    assert without.splits["train"].tokens == with_eos.splits["train"].tokens - 19
    source.write_text(source.read_text().replace('"}', '<|endoftext|>"}').replace("number 3<", "<") + '{"body": ""}\n')
    own = stored(tmp_path / "own", *words)
    assert own.tokens("train").tolist().count(own.eos_token_id) == 20, "none twice, and one after the blank row"
    (tmp_path / "lines.txt").write_text("a b\nc d\n")
    lines = stored(tmp_path / "c", "--dataset", tmp_path / "lines.txt", "--tokenizer", "train:300", "--append-eos")
    assert text_of(lines, "train") + text_of(lines, "validation") in (
        "a b\n<|endoftext|>c d\n<|endoftext|>", "c d\n<|endoftext|>a b\n<|endoftext|>"
    )  # fmt: skip


# --- odd files ---------------------------------------------------------------------------------------------------


def test_every_character_is_kept_and_counted(tmp_path: Path) -> None:
    """Blank lines, other line ends, zero bytes, an end of text of the text's own; only CRLF becomes a line end."""
    text = "\n  \none\n\na\u2028b\x0bc\x85d\re\na\0b<|endoftext|>b\né"
    (tmp_path / "in").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "in" / f"{split}.txt").write_bytes(text.replace("one\n", "one\r\n").encode())
    store = stored(tmp_path / "out", "--dataset", tmp_path / "in", "--tokenizer", "train:300")
    for split in ("train", "validation"):
        assert text_of(store, split) == text
        assert store.splits[split].bytes == len(text.encode())
        assert store.splits[split].words == 8 + 7, "of which 7 are ends of rows"


def test_one_word_alone_has_no_validation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "one.txt").write_text("word")
    assert run("--dataset", tmp_path / "one.txt", "--tokenizer", "train:400", "--out", tmp_path / "out") == (0, [])
    told = capsys.readouterr().err
    assert "one.txt has one word, so no validation split is cut from it\n" in told
    assert "the text is too small for a vocabulary of 400; it has 260\n" in told
    assert list(open_store(tmp_path / "out").splits) == ["train"]


def test_a_content_that_is_read_twice_is_said_once_and_by_rank_0(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "text" / f"{split}.txt").write_text("the same\n")
    words = ("--dataset", tmp_path / "text", "--tokenizer", "train:300", "--out", tmp_path / "out")
    assert run(*words) == (0, [])
    assert "train: train.txt and validation: validation.txt have the same content\n" in capsys.readouterr().err
    archive = shutil.make_archive(str(tmp_path / "text"), "zip", tmp_path / "text")
    assert run("--dataset", archive, *words[2:-1], tmp_path / "out2") == (0, [])
    assert "same content" not in capsys.readouterr().err, "two splits in one file"
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert run(*words) == (0, [])
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "its train split contains no text (no rows); use a dataset that does, or remove its file"),
        ("a.txt", b"\n \n\t\n\r\n", "contains no text (3 blank rows)"),
        ("a.jsonl", b"\n\n", "its train split contains no text (no rows)"),
        ("a.parquet", b"text", "a.parquet: is damaged or incomplete"),
    ],
)
def test_odd_files_have_one_message_and_leave_nothing(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    words = ["--dataset", tmp_path / name, "--tokenizer", "train:300", "--out", tmp_path / "new" / "out"]
    code, (problem,) = run(*words)
    assert code == 2
    assert message in problem
    assert everything(tmp_path) == [name]


def test_a_fault_late_in_another_split_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "train.txt").write_text("fine\n" * 1000)
    (tmp_path / "in" / "validation.txt").write_bytes(b"\xff")
    code, (problem,) = run("--dataset", tmp_path / "in", "--tokenizer", "train:300", "--out", tmp_path / "out")
    assert (code, everything(tmp_path)) == (2, ["in", "in/train.txt", "in/validation.txt"])
    assert "validation.txt, line 1: byte 0xff at offset 0 is not UTF-8" in problem


# --- settings ----------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path: Path) -> tuple[Path, list[Any]]:
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": f"text {i}", "body": f"body {i}"}) + "\n" for i in range(30)))
    words = ["--dataset", source, "--tokenizer", "train:300", "--out", tmp_path / "out"]
    assert run(*words, "--quiet") == (0, [])
    return source, words


@pytest.mark.parametrize(
    ("more", "difference"),
    [
        (["--text-column", "body"], "text_column text in the store, body requested"),
        (["--seed", "7"], "seed 42 in the store, 7 requested"),
        (["--validation-fraction", "0.1"], "validation_fraction 0.05 in the store, 0.1 requested"),
        (["--no-append-eos"], "append_eos True in the store, False requested"),
        (["--encoding", "utf-16"], "encoding none in the store, utf-16 requested"),
        (["--tokenizer", "train:301"], "tokenizer train:300 in the store, train:301 requested"),
        (["--dataset", "demo"], "dataset a.jsonl in the store, demo requested; text_column text in the store, none"),
    ],
)
def test_another_recipe_is_refused(recipe: tuple[Path, list[Any]], more: list[str], difference: str) -> None:
    words = recipe[1]
    if more[0] in words:
        words[words.index(more[0]) : words.index(more[0]) + 2] = []
    code, (problem,) = run(*words, *more)
    assert code == 2
    assert f"out: was made with other settings ({difference}" in problem
    assert problem.endswith("remove the folder, or make another store with wikift prepare --out DIR")


def test_the_same_recipe_is_known_by_content(recipe: tuple[Path, list[Any]], tmp_path: Path) -> None:
    source, words = recipe
    before = (tmp_path / "out" / "store.json").stat()
    assert run("--out", tmp_path / "out", "--verify") == (0, [])
    same: list[tuple[Callable[[], Any], list[Any]]] = [
        (lambda: None, []),
        (lambda: os.utime(source, (1, 1)), []),
        (lambda: None, ["--validation-fraction", "0.05", "--append-eos", "--workers", "1"]),
        (lambda: source.rename(tmp_path / "b.jsonl") and (tmp_path / "b.jsonl").rename(source), []),
    ]
    for change, more in same:
        change()
        assert run(*words, *more) == (0, [])
    assert (tmp_path / "out" / "store.json").stat() == before
    content = source.read_text()
    source.write_text(content.replace("text 7", "text 8"))
    assert "made with other settings (the files have changed)" in run(*words)[1][0]
    source.write_text(content + "\n")
    assert "made with other settings (the files have changed)" in run(*words)[1][0]


def test_a_text_that_changes_while_it_is_read_leaves_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = tmp_path / "texts", tmp_path / "out"
    folder.mkdir()
    for split in ("train", "validation"):
        (folder / f"{split}.txt").write_text(f"some {split} text\n" * 99)
    original = preparing.write_store

    def changed(*words: Any, **named: Any) -> TokenStore:
        store = original(*words, **named)
        with open(folder / "train.txt", "a") as file:
            file.write("and more\n")
        return store

    monkeypatch.setattr(preparing, "write_store", changed)
    code, (problem,) = run("--dataset", folder, "--tokenizer", "train:300", "--out", out)
    assert code == 2
    assert problem == f"{folder}: changed while it was read; run the command again when nothing is writing to it"
    assert os.listdir(tmp_path) == ["texts"]


def test_places_that_no_store_can_be_moved_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "to-nothing").symlink_to("nothing")
    monkeypatch.chdir(tmp_path / "folder")
    for out, kind in (
        (tmp_path / "link", "a symbolic link; name the folder itself"),
        (tmp_path / "to-nothing", "a symbolic link; name the folder itself"),
        (".", "the current folder, which cannot be replaced; name a folder in it"),
    ):
        code, (problem,) = run("--dataset", "demo", "--tokenizer", "train:300", "--out", out)
        assert code == 2
        assert problem.startswith(f"--out {out}: is {kind}")


def test_being_there_already_is_quick_and_light(recipe: tuple[Path, list[Any]]) -> None:
    code = (
        "import sys; from wikift.commands.prepare import main; assert main(sys.argv[1:]) == 0;"
        "heavy = {'torch', 'transformers', 'datasets', 'tokenizers', 'pyarrow'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    command = [sys.executable, "-c", code, *map(str, recipe[1])]
    subprocess.run(command, cwd=ROOT, check=True, timeout=60, capture_output=True)
