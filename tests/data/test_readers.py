"""Readers of the user's files: the rows they yield, compressed or not, and one message for each fault."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from wikift.base.errors import UserError
from wikift.data import open_file
from wikift.data.readers import read_rows
from wikift.data.splits import candidates

TEXTS = st.lists(
    st.sampled_from(["a", "é", "😀", "\n", "\r", "\r\n", " ", "\u2028", "\x0b", "\x85", "\x00", "\ufeff"])
).map("".join)


def rows(path: Path, column: str = "text", encoding: str | None = None) -> list[str]:
    files = list(candidates(path, (path.name,), named=True))
    return [text for texts in read_rows([f.file for f in files], files[0].kind, column, encoding) for text in texts]


def written(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@settings(max_examples=300, deadline=None)
@given(text=TEXTS, block=st.integers(1, 9))
@example(text="a\r\nb", block=2)
@example(text="\r", block=1)
@example(text="\ufeff\ufeffa\n", block=4)
def test_lines_end_with_newlines_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, text: str, block: int
) -> None:
    path = written(tmp_path_factory.mktemp("lines") / "t.txt", text)
    expected = text.removeprefix("\ufeff").replace("\r\n", "\n").split("\n")
    lines = [line + "\n" for line in expected[:-1]] + expected[-1:]
    with mock.patch.object(open_file, "BLOCK_BYTES", max(block, 3)):
        assert rows(path, encoding="utf-8") == [line for line in lines if line]


@pytest.mark.parametrize("block", [1 << 18, 1 << 20, 1 << 23])
def test_a_line_of_millions_is_several_rows_before_white_space_where_there_is_some(tmp_path: Path, block: int) -> None:
    """And they depend on the line alone."""
    path, mega = tmp_path / "t.txt", 1 << 20
    lines = ["short\n", "é" * 3 * mega + "\n", "word and " * 300_000 + "\n", "x" * (mega + 9) + "\n", "y" * 3 * mega]
    path.write_text("".join(lines))
    with mock.patch.object(open_file, "BLOCK_BYTES", block):
        texts = rows(path)
    assert "".join(texts) == path.read_text()
    first, *others = [len(text) for text in texts]
    assert [first, *others[:3], *others[6:]] == [6, mega, mega, mega + 1, mega + 10, *[mega] * 3]
    assert all(text.startswith(" ") and text.endswith(("word", "and", "\n")) for text in texts[5:7])
    assert others[3:5] == [mega + 4, mega + 1]


# --- encodings ---------------------------------------------------------------------------------------------------

RUSSIAN = "Привет, мир. Это обычный текст.\n" * 40


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("text", [RUSSIAN, "plain, é\n" * 9, "这是一个普通的中文句子。\n" * 40], ids=["ru", "fr", "zh"])
def test_unicode_with_and_without_a_mark(tmp_path: Path, encoding: str, text: str) -> None:
    assert "".join(rows(written(tmp_path / "t.txt", text.encode(encoding)))) == text
    line = json.dumps({"text": text}, ensure_ascii=False)
    assert rows(written(tmp_path / "t.jsonl", f"{line}\n{line}\n".encode(encoding))) == [text, text]


@pytest.mark.parametrize(
    ("text", "encoding"),
    [(RUSSIAN, "cp1251"), ("这是一个普通的中文句子。\n" * 9, "gb18030"), ("café au lait\n" * 9, "cp1252")],
)
def test_other_encodings_are_proposed_and_take_a_setting(tmp_path: Path, text: str, encoding: str) -> None:
    path = written(tmp_path / "t.txt", text.encode(encoding))
    with pytest.raises(UserError, match=rf"is not UTF-8; if it is text, name its encoding: --encoding {encoding}"):
        rows(path)
    assert "".join(rows(path, encoding=encoding)) == text


@pytest.mark.parametrize("block", [7, 1 << 20])
@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("fine\nfine too é\ncaf".encode() + b"\xe9 au lait\n", "line 3: byte 0xe9 at offset 20 is not UTF-8"),
        (b"\xef\xbb\xbfab\n\xf0\x9f", "line 2: byte 0xf0 at offset 6 is not UTF-8"),  # ends within a character
    ],
)
def test_invalid_utf8_is_placed(tmp_path: Path, block: int, content: bytes, fault: str) -> None:
    path = written(tmp_path / "t.txt", content)
    with mock.patch.object(open_file, "BLOCK_BYTES", block), pytest.raises(UserError, match=f"t.txt, {fault}"):
        rows(path)


# --- compression -------------------------------------------------------------------------------------------------


def by_arrow(content: bytes, codec: str) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        stream.write(content)
    packed: bytes = sink.getvalue().to_pybytes()
    return packed


PACKERS = {
    "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": lambda data: by_arrow(data, "zstd"),
    "lz4": lambda data: by_arrow(data, "lz4"),
}  # fmt: skip


@pytest.mark.parametrize("ending", PACKERS)
def test_compression_is_known_by_its_bytes(tmp_path: Path, ending: str) -> None:
    pack, text = PACKERS[ending], "".join(f"line {i}\n" for i in range(1000))
    for name in (f"a.txt.{ending}", "a.txt", f"a.{ending}"):
        assert "".join(rows(written(tmp_path / name, pack(text.encode())))) == text
    assert "".join(rows(written(tmp_path / f"plain.txt.{ending}", text))) == text, "not compressed after all"
    twice = pack(text.encode()) + pack(text.encode())
    assert "".join(rows(written(tmp_path / "twice", twice))) == 2 * text
    assert rows(written(tmp_path / f"a.jsonl.{ending}", pack(b'{"text": "a"}\n'))) == ["a"]
    cut = written(tmp_path / f"cut.txt.{ending}", pack(text.encode())[:-20])
    with pytest.raises(UserError, match=rf"^{cut}: is damaged or incomplete \(.+\); copy or download it again"):
        rows(cut)


# --- documents ---------------------------------------------------------------------------------------------------

DOCUMENTS = [{"text": text, "n": 1} for text in ("one\ntwo", "", "😀 \u2028 é", "\x00", 'a "quote"; b,\tc')]
JSON_FORMS = {
    "lines": "\r\n".join(json.dumps(d, ensure_ascii=i % 2 == 0) for i, d in enumerate(DOCUMENTS)) + "\n\n  \n",
    "list": json.dumps(DOCUMENTS),
    "list over lines": json.dumps(DOCUMENTS, indent=2, ensure_ascii=False),
    "objects over lines": "\n".join(json.dumps(d, indent=2) for d in DOCUMENTS),
    "field of an object": json.dumps({"version": "0.1", "data": DOCUMENTS, "count": 4}),
}


@pytest.mark.parametrize("form", JSON_FORMS)
@pytest.mark.parametrize("block", [1, 5, 1 << 20])
def test_json_rows(tmp_path: Path, form: str, block: int) -> None:
    path = written(tmp_path / "t.json", "\ufeff" + JSON_FORMS[form])
    with (
        mock.patch.object(open_file, "BLOCK_BYTES", max(block, 3)),
        mock.patch("wikift.data.readers._BATCH_CHARACTERS", block),
    ):
        assert rows(path) == [document["text"] for document in DOCUMENTS]


JSON_FAULTS = {
    "not JSON": (b"{'text': 1}", r"is not JSON \(Expecting property name.*one object on each line, or a list"),
    "cut off": (b'{"text": "ab', r"is not JSON \(Invalid control character"),
    "plain text": (b"once upon a time", "is not JSON"),
    "a list": (b'["text"]', r'is a list, not an object; each row must be like \{"text": "its text"\}'),
    "a number": (b"5", "is a number, not an object"),
    "no column": (b'{"body": "x", "id": 3}', r"has no 'text', it has body \(a text\), id .* --text-column body$"),
    "no columns": (b"{}", "has no 'text', it has nothing; fix or delete the row"),
    "nested": (b'{"d": {"body": "x"}, "m": {"i": 1}}', r"it has d.body \(a text\), m.i .*--text-column d.body$"),
    "chat": (
        b'{"messages": [{"role": "user", "content": "Hi"}]}',
        r"it has messages \(a list of \{role, content\}\); write the turns of each chat as one text",
    ),
    "null": (b'{"text": null}', "'text' is null, not text; fix or delete the row"),
    "number": (b'{"text": 5}', "'text' is a number, not text"),
    "list": (b'{"text": ["a"]}', "'text' is a list, not text"),
    "an object": (b'{"text": {"en": "a", "de": "b"}}', "'text' is an object, not text; .*--text-column NAME"),
    "not UTF-8": (b'{"text": "caf\xe9"}', "byte 0xe9 at offset 45 is not UTF-8"),
}


@pytest.mark.parametrize(("line", "message"), JSON_FAULTS.values(), ids=JSON_FAULTS.keys())
def test_json_faults(tmp_path: Path, line: bytes, message: str) -> None:
    path = written(tmp_path / "t.jsonl", b'{"text": "first \\ud83d\\ude00"}\n\n' + line + b'\n{"text": "last"}\n')
    with pytest.raises(UserError, match=rf"^{path}, line 3: .*{message}"):
        rows(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": "\\ud83d"}', "row 2: holds half of a surrogate pair"),
        ('{"train": [{"text": "a"}], "test": [{"text": "b"}]}', "is an object with 2 lists; save each"),
        ('[{"text": "a"}, {"text": "b"}', r"line 1: is not JSON \(expecting ','\); a JSON file has one object on each"),
        ('[{"text": "a"}] {"text": "b"}]', r"line 1: is not JSON \(Expecting value\)"),
        ('["a", "b"]', "line 1: is a text, not an object"),
        ('[{"text": "a"}, {"text": 1}]', "line 1, row 2: 'text' is a number"),
    ],
)
def test_faults_of_a_json_file(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"^{tmp_path}/t.json.*{message}"):
        rows(written(tmp_path / "t.json", content))


CSV_FORMS = {
    "commas": 'id,text\r\n1,"one, ""two"""\r\n2,"three\nfour"\r\n\r\n3,\r\n',
    "semicolons": '\ufeffid; text\n1;"one, ""two"""\n2;"three\nfour"\n3;',
    "tabs": 'id\ttext\n1\tone, "two"\n2\t"three\nfour"\n3\t\n',
}


@pytest.mark.parametrize("form", CSV_FORMS)
@pytest.mark.parametrize("name", ["t.csv", "t.tsv"])
def test_csv_rows(tmp_path: Path, form: str, name: str) -> None:
    with mock.patch.object(open_file, "BLOCK_BYTES", 3):
        assert rows(written(tmp_path / name, CSV_FORMS[form])) == ['one, "two"', "three\nfour", ""]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("hello,world\nx,y\n", r"line 1: has no 'text', it has hello \(a text\), world .*; name the column with"),
        ("id,text\n1,a,b\n", "line 2: has 3 fields, the first line 2"),
        ('id,text\n1,"open\n2,x\n', "line 3: is not CSV"),
        ('id,text\n1,"Hello" he said\n', "line 2: is not CSV .*put fields with quotes in quotes"),
    ],
)
def test_csv_faults(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"^{tmp_path}/t.csv, {message}"):
        rows(written(tmp_path / "t.csv", content))
