# python -m pytest tests/data/test_readers.py
"""Readers of the user's files: the rows they give, and one clear message for each odd file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from wikift.base.errors import UserError
from wikift.data.readers import read_jsonl, read_lines, read_parquet

TEXTS = st.lists(
    st.sampled_from(["a", "é", "😀", "\n", "\r", "\r\n", " ", "\u2028", "\x0b", "\x85", "\x00", "\ufeff"])
).map("".join)


def rows(batches: Any) -> list[str]:
    return [text for batch in batches for text in batch]


@settings(max_examples=300, deadline=None)
@given(text=TEXTS, block=st.integers(1, 9))
@example(text="a\r\nb", block=2)
@example(text="\r", block=1)
@example(text="\ufeff\ufeffa\n", block=4)
def test_lines_end_with_newlines_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, text: str, block: int
) -> None:
    path = tmp_path_factory.mktemp("lines") / "t.txt"
    path.write_bytes(text.encode())
    expected = text.removeprefix("\ufeff").replace("\r\n", "\n").split("\n")
    lines = [line + "\n" for line in expected[:-1]] + expected[-1:]
    with mock.patch("wikift.data.readers._BLOCK_BYTES", max(block, 3)):
        assert rows(read_lines(path)) == [line for line in lines if line]


@pytest.mark.parametrize("block", [1 << 18, 1 << 20, 1 << 23])
def test_a_line_of_millions_is_several_rows_before_white_space_where_there_is_some(tmp_path: Path, block: int) -> None:
    """And they depend on the line alone."""
    path, million = tmp_path / "t.txt", 1 << 20
    lines = [
        "short\n",
        "é" * 3 * million + "\n",
        "word and " * 300_000 + "\n",
        "x" * (million + 9) + "\n",
        "y" * 3 * million,
    ]
    path.write_text("".join(lines))
    with mock.patch("wikift.data.readers._BLOCK_BYTES", block):
        texts = rows(read_lines(path))
    assert "".join(texts) == path.read_text()
    first, *others = [len(text) for text in texts]
    assert [first, *others[:3], *others[6:]] == [6, million, million, million + 1, million + 10, *[million] * 3]
    assert all(text.startswith(" ") and text.endswith(("word", "and", "\n")) for text in texts[5:7])
    assert others[3:5] == [million + 4, million + 1]


@pytest.mark.parametrize("block", [7, 1 << 20])
def test_invalid_utf8_is_placed(tmp_path: Path, block: int) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("fine\nfine too é\ncaf".encode() + b"\xe9 au lait\n")
    message = r"latin.txt, line 3: byte 0xe9 at offset 20 is not UTF-8; save the file as UTF-8.*iconv"
    with mock.patch("wikift.data.readers._BLOCK_BYTES", block), pytest.raises(UserError, match=message):
        list(read_lines(path))
    path.write_text("fine\n", encoding="utf-16")
    with (
        mock.patch("wikift.data.readers._BLOCK_BYTES", block),
        pytest.raises(UserError, match=r"line 1: byte 0xff at offset 0 is not UTF-8.*iconv -f UTF-16 -t UTF-8"),
    ):
        list(read_lines(path))
    path.write_bytes(b"\xef\xbb\xbfab\n\xf0\x9f")  # ends within a character; the mark counts
    with (
        mock.patch("wikift.data.readers._BLOCK_BYTES", block),
        pytest.raises(UserError, match="line 2: byte 0xf0 at offset 6"),
    ):
        list(read_lines(path))


def test_jsonl_rows(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    texts = ["one\ntwo", "", "😀 \u2028 é", "\x00"]
    lines = [json.dumps({"text": text, "n": 1}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines[:2], "", "  ", *lines[2:]]).encode())
    assert [text for batch in read_jsonl(path, "text") for text in batch] == texts
    with mock.patch("wikift.data.readers._BATCH_CHARACTERS", 1):
        assert [text for batch in read_jsonl(path, "text") for text in batch] == texts


JSONL_FAULTS = {
    "not JSON": (b"{'text': 1}", r"is not JSON \(Expecting property name"),
    "cut off": (b'{"text": "ab', r"is not JSON \(Unterminated string"),
    "plain text": (b"once upon a time", "is not JSON"),
    "a list": (b'["text"]', r'is a list, not an object; each line must be like \{"text": \.\.\.\}'),
    "a number": (b"5", "is a number, not an object"),
    "no column": (b'{"body": "x", "id": 3}', "has no 'text', it has body, id; name the column with --text-column"),
    "no columns": (b"{}", "has no 'text', it has nothing"),
    "null": (b'{"text": null}', "'text' is null, not text; fix or delete the line"),
    "number": (b'{"text": 5}', "'text' is a number, not text"),
    "list": (b'{"text": ["a"]}', "'text' is a list, not text"),
    "half a pair": (b'{"text": "\\ud83d"}', "'text' holds half of a surrogate pair"),
    "half a pair, capitals": (b'{"text": "\\uDE00 x"}', "'text' holds half of a surrogate pair"),
    "not UTF-8": (b'{"text": "caf\xe9"}', "byte 0xe9 at offset 45 is not UTF-8"),
}


def test_an_offset_counts_the_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "\xe9"}')
    with pytest.raises(UserError, match="line 1: byte 0xe9 at offset 13 is not UTF-8"):
        list(read_jsonl(path, "text"))


@pytest.mark.parametrize(("line", "message"), JSONL_FAULTS.values(), ids=JSONL_FAULTS.keys())
def test_jsonl_faults(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"text": "first \\ud83d\\ude00"}\n\n' + line + b'\n{"text": "last"}\n')
    with pytest.raises(UserError, match=rf"^{path}, line 3: .*{message}"):
        list(read_jsonl(path, "text"))


def parquet(path: Path, **columns: Any) -> Path:
    import pyarrow as pa
    import pyarrow.parquet

    pa.parquet.write_table(pa.table(columns), path, row_group_size=300)
    return path


def test_parquet_rows(tmp_path: Path) -> None:
    import pyarrow as pa

    texts = [f"row {i} é\n" * (i % 3) for i in range(1000)]
    kinds = {
        "text": pa.array(texts),
        "large": pa.array(texts, pa.large_string()),
        "coded": pa.array(texts).dictionary_encode(),
        "view": pa.array(texts, pa.string_view()),
    }
    path = parquet(tmp_path / "t.parquet", other=list(range(1000)), **kinds)
    for column in kinds:
        batches = list(read_parquet(path, column))
        assert [text for batch in batches for text in batch] == texts
        assert max(map(len, batches)) <= 300


def test_parquet_faults(tmp_path: Path) -> None:
    import pyarrow as pa

    path = parquet(
        tmp_path / "t.parquet", text=["a"] * 400 + [None], n=[1] * 401, raw=[b"\xff"] * 401,
        bad=pa.array([b"\xff"] * 401).view(pa.binary()).cast(pa.string(), safe=False),
    )  # fmt: skip
    with pytest.raises(UserError, match=rf"^{path}, row 401: 'text' is null, not text; fix or delete the row"):
        list(read_parquet(path, "text"))
    with pytest.raises(
        UserError, match=rf"^{path}: has no column 'body', it has text, n, raw, bad; name one with --text-column"
    ):
        list(read_parquet(path, "body"))
    for column, kind in (("n", "int64"), ("raw", "binary")):
        with pytest.raises(UserError, match=f"column '{column}' holds {kind}, not text"):
            list(read_parquet(path, column))
    with pytest.raises(UserError, match=r"row 1: 'bad' is not UTF-8"):
        list(read_parquet(path, "bad"))
    whole = path.read_bytes()
    for content in (
        whole[: len(whole) // 2],
        whole[:3],
        b"",
        b"PAR1 no PAR1",
        whole[:4] + bytes(len(whole) - 300) + whole[-296:],
    ):
        path.write_bytes(content)
        with pytest.raises(
            UserError, match=rf"^{path}: is not a complete parquet file \(.+\); copy or download it again"
        ):
            list(read_parquet(path, "text"))


def test_a_parquet_file_is_read_in_batches_of_bounded_size(tmp_path: Path) -> None:
    """Many short rows at once, few long ones, also where a file begins with short ones."""
    import pyarrow as pa
    import pyarrow.parquet

    texts = [f"row {i}\n" for i in range(20_000)] + [f"{i:06}" * 50_000 for i in range(20)]
    path = tmp_path / "t.parquet"
    with pa.parquet.ParquetWriter(path, pa.schema([("text", pa.string())])) as file:
        file.write_table(pa.table({"text": texts[:20_000]}))
        file.write_table(pa.table({"text": texts[20_000:]}))
    batches = list(read_parquet(path, "text"))
    assert [text for batch in batches for text in batch] == texts
    assert max(map(len, batches)) == 8192
    assert max(len(batch.data) for batch in batches) <= 3_300_000


def test_a_row_that_is_not_utf8_is_found_among_thousands(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    raw = pa.array([b"a"] * 5000 + [b"\xff"] + [b"a"] * 100).cast(pa.string(), safe=False)
    pa.parquet.write_table(pa.table({"text": raw}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"row 5001: 'text' is not UTF-8"):
        list(read_parquet(tmp_path / "t.parquet", "text"))


@pytest.mark.parametrize("reader", [read_lines, read_jsonl, read_parquet])
def test_missing_file(tmp_path: Path, reader: Any) -> None:
    with pytest.raises(UserError, match=r"gone: cannot be read \(No such file or directory\)"):
        list(reader(tmp_path / "gone", "text"))
