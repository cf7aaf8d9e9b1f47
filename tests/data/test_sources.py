"""Names and paths to rows: files, folders, the Hub's layout, a Hub cache, the demo, the cut of a validation split."""

from __future__ import annotations

import gzip
import itertools
import re
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from wikift.base.errors import UserError
from wikift.data.corpus import Corpus
from wikift.data.sources import Source, open_source, source_problems


def opened(path: Path | str, *, seed: int = 42, **others: Any) -> Corpus:
    return open_source(Source(str(path), seed=seed, **others))


def rows_of(corpus: Corpus, split: str) -> list[str]:
    return list(corpus.texts(split))


def written(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / re.sub("(?<=[a-z])__", ".", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


# --- files and folders -------------------------------------------------------------------------------------------


def test_a_folder_of_three_text_files(tmp_path: Path) -> None:
    folder = written(tmp_path / "mine", test__txt="c", train__txt="a\nb\n\n", validation__txt="v\n", run__py="no")
    corpus = opened(folder)
    assert list(corpus.splits) == ["train", "validation", "test"]
    for _ in range(2):  # read again
        assert [rows_of(corpus, split) for split in corpus.splits] == [["a\n", "b\n", "\n"], ["v\n"], ["c"]]
    assert (corpus.name, corpus.config, corpus.rows_are_documents, corpus.cut) == ("mine", None, False, None)
    assert corpus.sizes == {"test": 1, "train": 5, "validation": 2}
    assert corpus.notes == ["train: train.txt", "validation: validation.txt", "test: test.txt", "not used: run.py"]


def test_several_files_of_a_split_and_lines_that_end_with_them(tmp_path: Path) -> None:
    texts = enumerate(("a\nb", "", "c\n", "d"))
    shards = {f"train-0000{number}-of-00004.txt": text for number, text in texts}
    assert rows_of(opened(written(tmp_path, **shards, validation__txt="v")), "train") == ["a\n", "b\n", "c\n", "d"]


# The files of a folder, what is read of each split, and what is named as not used.
LAYOUTS: dict[str, tuple[str, str, str]] = {
    "words of datasets": ("training.txt val.txt testing.txt", "training.txt | val.txt | testing.txt", ""),
    "other cases": ("TRAIN.txt wiki.dev.txt corpus_test2.txt", "TRAIN.txt | wiki.dev.txt | corpus_test2.txt", ""),
    "WikiText's release": ("wiki.train.tokens wiki.valid.tokens", "wiki.train.tokens | wiki.valid.tokens", ""),
    "several of a split": (
        "train.txt train_1.txt train-10.txt train-3.txt eval.txt",
        "train-3.txt train-10.txt train.txt train_1.txt | eval.txt", "",
    ),
    "any number": ("b.txt a.txt .DS_Store ._a.txt Thumbs.db", "a.txt b.txt", ".DS_Store ._a.txt Thumbs.db"),
    "no ending": ("part-00000 part-00001 _SUCCESS .part.crc", "part-00000 part-00001", "_SUCCESS .part.crc"),
    "folders": ("train/a.txt train/b/a_test.txt dev/c .git/x", "train/a.txt train/b/a_test.txt | dev/c", ".git"),
    "folders of other names": ("x/a.txt y/z/b.txt", "x/a.txt y/z/b.txt", ""),
    "what lies beside": (
        "README.md LICENSE train.txt test.txt notes.md run.py paper.pdf",
        "train.txt | | test.txt", "LICENSE README.md paper.pdf run.py notes.md",
    ),
    "data": ("data/train-0-of-1.txt data/test-0-of-1.txt", "data/train-0-of-1.txt | | data/test-0-of-1.txt", ""),
    "shards from 1": ("a-2-of-2.txt a-1-of-2.txt", "a-1-of-2.txt a-2-of-2.txt", ""),
    "compressed": ("train.txt.gz valid.txt", "train.txt.gz | valid.txt", ""),
    "a cache of datasets": ("train/a.txt train/cache-1.arrow", "train/a.txt", "train"),
    "beside folders": ("__MACOSX/._a.txt en/train.txt en/test.txt", "en/train.txt | | en/test.txt", "__MACOSX"),
}  # fmt: skip


@pytest.mark.parametrize(("names", "read", "unused"), LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("packed", [None, "zip", "tar", "gztar"])
def test_files_of_a_folder_or_an_archive(
    tmp_path: Path, names: str, read: str, unused: str, packed: str | None
) -> None:
    folder = written(tmp_path / "folder", **{name: f"{name}\n" for name in names.split()})
    corpus = opened(shutil.make_archive(str(tmp_path / "all"), packed, folder) if packed else folder)
    splits = dict(zip(("train", "validation", "test"), map(str.split, read.split("|")), strict=False))
    files = Source(str(tmp_path / f"all.{'tar.gz' if packed == 'gztar' else packed}" if packed else folder)).files
    assert files is not None
    shown = {split: [each.shown for each in of_split] for split, of_split in files.splits.items()}
    order = sorted if packed else list
    assert {split: order(of_split) for split, of_split in shown.items()} == {
        split: order(of_split) for split, of_split in splits.items() if of_split
    }
    assert {each.shown.split("/")[0] for each in files.unused} == set(unused.split())
    assert sorted(rows_of(corpus, "test") if "test" in splits else []) == [
        f"{name}\n" for name in splits.get("test", [])
    ]


def test_datasets_named_one_by_one_and_by_pattern(tmp_path: Path) -> None:
    names = ("a.txt", "b.txt", "train.txt", "dev.txt", "more/c.txt", "other/train/d.txt", "x-00001-of-00002.txt")
    written(tmp_path, **{name: f"{name}\n" for name in names})

    def read(*words: str) -> dict[str, list[str]]:
        dataset, *more = (str(tmp_path / word) for word in words)
        files = Source(dataset, more=tuple(more)).files
        assert files is not None
        return {split: [each.shown for each in of_split] for split, of_split in files.splits.items()}

    assert read("b.txt", "a.txt") == {"train": ["b.txt", "a.txt"]}
    assert read("dev.txt") == {"train": ["dev.txt"]}, "one file is all train"
    assert read("dev.txt", "b.txt", "more") == {"train": ["b.txt", "more/c.txt"], "validation": ["dev.txt"]}
    assert read("other", "dev.txt") == {"train": ["other/train/d.txt"], "validation": ["dev.txt"]}
    assert read("[ab].txt") == {"train": ["a.txt", "b.txt"]}
    assert read("[abtd]*.txt") == {"train": ["train.txt"], "validation": ["dev.txt"]}
    assert read("**/[cd].txt") == {"train": ["c.txt", "d.txt"]}
    assert read("x-00001-of-00002.txt") == {"train": ["x-00001-of-00002.txt"]}


def test_a_folder_of_save_to_disk(tmp_path: Path) -> None:
    import datasets

    texts = [f"text {i}" for i in range(50)]
    saved = datasets.Dataset.from_dict({"text": texts})
    saved.save_to_disk(tmp_path / "one", num_shards=3)
    (tmp_path / "one" / "cache-1.arrow").write_text("of a map")
    corpus = opened(tmp_path / "one", validation_fraction=0.1)
    assert sorted(rows_of(corpus, "train") + rows_of(corpus, "validation")) == sorted(texts)
    assert corpus.notes[-1] == "not used: cache-1.arrow, dataset_info.json, state.json"
    datasets.DatasetDict(train=saved, test=saved).save_to_disk(tmp_path / "two")
    corpus = opened(tmp_path / "two", validation_fraction=0.5)
    assert rows_of(corpus, "test") == texts
    (tmp_path / "one" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(UserError, match=r"data-00001-of-00003\.arrow is missing, which its state.json names"):
        opened(tmp_path / "one")


LETTERS = "abcdefghijklmnopqrstuvwxyz"
DOUBLED = "".join(f"{after}: &{after} [*{letter}, *{letter}]\n" for letter, after in itertools.pairwise(LETTERS))
DOUBLING = f"---\na: &a [b]\n{DOUBLED}configs:\n- config_name: *z\n  data_files: {{train: *z}}\n---\n"
CARD = "---\nconfigs:\n- config_name: x\n  data_files: x/train-*\n---\n"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
PATH_FAULTS: dict[str, tuple[dict[str, str], str, dict[str, Any], str]] = {
    "nothing of that pattern": ({"a.txt": ""}, "*.csv", {}, r"--dataset \S*csv: no file matches; fix it"),
    "nothing fitting": (
        {"README.md": "", "b.pdf": ""}, "", {},
        r"has no text \(there: README.md, b.pdf\); wikift reads .txt, .*; unpack or convert it, or rename it to .txt",
    ),
    "empty folder": ({}, "", {}, r"\(there: nothing\)"),
    "unknown ending": ({"a.pdf": "x"}, "a.pdf", {}, r"a.pdf: wikift reads .txt, .*; unpack or convert it, or rename"),
    "a token store": ({"store.json": "{}", "train.bin": ""}, "", {}, "is a token store, not text; train .* --data /"),
    "binary": ({"corpus": "a\0\1b" * 99}, "corpus", {}, "corpus: wikift reads"),
    "another archive": ({"a.7z": "x"}, "a.7z", {}, "a.7z: wikift reads"),
    "mixed": (
        {"train.txt": "x", "test.jsonl": "{}"}, "", {},
        r"mixes kinds of files \(json in test.jsonl, lines in train.txt\); name those .* --dataset '?/.*/\*.txt",
    ),
    "a split not read": ({"train.txt": "x", "test.pdf": ""}, "", {}, "test.pdf: looks like test text, and wikift"),
    "no train": ({"corpus.txt": "x", "test.txt": "x"}, "", {}, "has test but no train; name it train.*: corpus.txt"),
    "two splits": ({"train_test.txt": "x"}, "", {}, "train_test.txt: is named train and test; rename it for one split"),
    "folder against name": ({"eval/train.txt": "x"}, "", {}, "eval/train.txt: is named eval and train"),
    "a gap": (
        {"train-00000-of-00003.txt": "x", "train-00002-of-00003.txt": "x"}, "", {},
        "train-00001-of-00003.txt: missing, of 00003; download it again, or name each unpacked file with --dataset",
    ),
    "twice": ({"train.txt": "x", "train.txt.gz": "x"}, "", {}, "same text twice, .*train.txt and .*txt.gz; remove"),
    "pointer": (
        {"a.txt": POINTER, "train-0-of-1.parquet": POINTER}, "", {},
        "parquet: is a Git LFS pointer, not the file; fetch it with git lfs pull, or download it",
    ),
    "config of a folder": ({"train.txt": "x"}, "", {"config": "c"}, "c: has no effect, .* has no configurations"),
    "encoding of a table": (
        {"a.parquet": "PAR1"}, "a.parquet", {"encoding": "cp1252"}, "cp1252: has no effect, .* is not a text file"
    ),
    "fraction of nothing": (
        {"train.txt": "x", "validation.txt": "x"}, "", {"validation_fraction": 0.1},
        "--validation-fraction 0.1: has no effect, .* has a validation split of its own; omit it",
    ),
    "fraction without train": ({"test.txt": "x"}, "", {"validation_fraction": 0.1}, "has no train split to cut"),
    "README that reads outside": (
        {"README.md": CARD.replace("x/train-*", "../secret.txt")}, "", {},
        r"README.md: '../secret.txt' leads out of the folder; correct it",
    ),
    "README that writes outside": (
        {"README.md": CARD.replace("x/train-*", "\n  - split: ../x\n    path: a.txt"), "a.txt": "x"}, "", {},
        r"README.md: split '../x' must be a word; correct it",
    ),
    "README with a pattern that is none": (
        {"README.md": CARD.replace("x/train-*", "a**")}, "", {}, r"files that are not in the folder \(a\*\*\)",
    ),
    "README that doubles itself": ({"README.md": DOUBLING}, "", {"config": "c"}, "no such configuration; choose one"),
    "broken README": ({"README.md": "---\nconfigs: [\n---\n"}, "", {}, r"front matter cannot be read \(while parsing"),
    "README and a missing shard": (
        {"README.md": CARD, "x/train-0-of-2.txt": "a"}, "", {}, "train-1-of-2.txt: missing, of 2; download it again",
    ),
    "README of a file not read": ({"README.md": CARD, "x/train-a.pdf": "a"}, "", {}, "train-a.pdf: wikift reads .txt"),
    "README of files that are gone": (
        {"README.md": CARD}, "", {},
        r"README.md names files that are not in the folder \(x/train-\*\); download it again",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("files", "name", "others", "message"), PATH_FAULTS.values(), ids=PATH_FAULTS.keys())
def test_path_faults(tmp_path: Path, files: dict[str, str], name: str, others: dict[str, Any], message: str) -> None:
    written(tmp_path, **files)
    problems = source_problems(Source(str(tmp_path / name), **others))
    with pytest.raises(UserError, match=message):
        raise UserError(*problems)


def test_no_link_leads_out_of_a_folder(tmp_path: Path) -> None:
    """Somebody's dataset reads no other file of yours; within the folder, and in the Hub's cache, links are read."""
    secret, folder = tmp_path / "secret.txt", tmp_path / "corpus"
    secret.write_text("a secret\n")
    written(folder, train__txt="a text\n" * 40, **{"README.md": CARD.replace("x/train-*", "c/*")})
    written(folder / "sub", test__txt="another\n")
    (folder / "dev.txt").symlink_to("sub/test.txt")
    (folder / "out").symlink_to(tmp_path)
    (folder / "c").symlink_to(tmp_path)
    (problem,) = source_problems(Source(str(folder)))
    assert "README.md names files that are not in the folder (c/*)" in problem
    (folder / "README.md").unlink()
    corpus = opened(folder)
    assert list(corpus.splits) == ["train", "validation", "test"]
    assert corpus.notes[-1] == "not used: c, out"
    (folder / "eval.txt").symlink_to(secret)
    (problem,) = source_problems(Source(str(folder)))
    assert problem.startswith(f"{folder}/eval.txt: is a link to a file that is missing or not in the folder; copy")
    snapshot = tmp_path / "datasets--x" / "snapshots" / ("0" * 40)
    written(tmp_path / "datasets--x" / "blobs", ab12="a text\n")
    snapshot.mkdir(parents=True)
    (snapshot / "train.txt").symlink_to("../../blobs/ab12")
    assert next(iter(opened(snapshot).splits)) == "train"


def test_archives_that_cannot_be_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "text\n" * 99)
    content = path.read_bytes()
    path.write_bytes(content[:-30])
    (problem,) = source_problems(Source(str(path)))
    assert problem.startswith(f"{path}: is damaged or incomplete (File is not a zip file)")
    path.write_bytes(content.replace(b"\x14\0\0\0\0\0", b"\x14\0\1\0\0\0"))  # the flag of a password
    (problem,) = source_problems(Source(str(path)))
    assert "cannot be unpacked here" in problem
    assert "unpack it and name the folder" in problem
    for names, message in (
        (("a-0-of-2.txt",), "a-1-of-2.txt: missing, of 2; download it again, or name each unpacked file"),
        (("a.txt", "a.csv"), "mixes kinds of files (csv in a.csv, lines in a.txt); name those of one kind, unpacked"),
    ):
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, "text\n")
        (problem,) = source_problems(Source(str(path)))
        assert message in problem


def test_a_text_that_is_named_otherwise_is_read_as_its_name_says(tmp_path: Path) -> None:
    csv, text = "id,text\n1,a\n2,b\n", '{"text": "a"}\n{"text": "b"}\n'
    written(tmp_path, a=csv, b=text, c__txt=text, d__txt=csv)
    for name, kind in (("c.txt", "JSON"), ("d.txt", "CSV")):
        corpus = opened(tmp_path / name)
        assert corpus.notes == [
            f"{name}: looks like {kind}, and is read as plain text, as its name says; rename it if it is not"
        ]
        assert not corpus.rows_are_documents
    for name in "ab":  # no ending, by looking
        corpus = opened(tmp_path / name)
        assert sorted(rows_of(corpus, "train") + rows_of(corpus, "validation")) == ["a", "b"]
        assert corpus.notes == []


def test_links_and_archives_that_hold_nothing(tmp_path: Path) -> None:
    (tmp_path / "split").mkdir()
    for name in ("train.txt", "train.txt~"):
        (tmp_path / "split" / name).write_text("a\n" * 40)
    (tmp_path / "split" / "other.txt").symlink_to("gone.txt")
    assert opened(tmp_path / "split").notes[-1] == "not used: other.txt, train.txt~"
    (tmp_path / "split" / "validation.txt").symlink_to("gone.txt")
    with pytest.raises(UserError, match=r"validation\.txt: is a link to a file that is missing or not in the folder"):
        opened(tmp_path / "split")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("folder/", "")
    with pytest.raises(UserError, match=r"a\.zip: is an archive without files"):
        opened(tmp_path / "a.zip")
    with tarfile.open(tmp_path / "a.tar", "w") as packed:
        packed.add(tmp_path / "split", "data")
    with pytest.raises(UserError, match=r"a\.tar: data/other\.txt is a link, and links in an archive are not read"):
        opened(tmp_path / "a.tar")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(gzip.compress(b"b\n" * 40)))
    assert len(rows_of(opened(tmp_path / "b.txt.gz"), "train")) == 38
