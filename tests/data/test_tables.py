"""Parquet and Arrow: the rows they yield, and one message for each fault. Run: pytest tests/data/test_tables.py"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from tests.data.test_readers import rows, written
from wikift.base.errors import UserError
from wikift.data.readers import read_rows
from wikift.data.splits import candidates

FOUND = Path(__file__).parents[1] / "fuzz" / "found"


def parquet(path: Path, **columns: Any) -> Path:
    pa.parquet.write_table(pa.table(columns), path, row_group_size=300)
    return path


def arrow(path: Path, table: Any, new: Any) -> Path:
    with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
        writer.write_table(table)
    return path


def test_tables(tmp_path: Path) -> None:
    texts = [f"row {i} é\n" * (i % 3) for i in range(1000)]
    kinds = {
        "text": pa.array(texts), "large": pa.array(texts, pa.large_string()),
        "coded": pa.array(texts).dictionary_encode(), "view": pa.array(texts, pa.string_view()),
        "nested": pa.array([{"meta": {"body": text}} for text in texts]),
    }  # fmt: skip
    path = parquet(tmp_path / "t.parquet", other=list(range(1000)), **kinds)
    table = pa.table({name: kinds[name] for name in ("text", "nested")})
    packed = written(tmp_path / "t.parquet.gz", gzip.compress(path.read_bytes()))
    for column in (*(name for name in kinds if name != "nested"), "nested.meta.body"):
        assert rows(path, column) == rows(packed, column) == texts
    for new in (pa.ipc.new_file, pa.ipc.new_stream):
        for column in ("text", "nested.meta.body"):
            assert rows(arrow(tmp_path / "t.arrow", table, new), column) == texts
    assert rows(arrow(tmp_path / "odd.parquet", table, pa.ipc.new_file)) == texts


def test_faults_of_tables(tmp_path: Path) -> None:
    path = parquet(
        tmp_path / "t.parquet", text=["a"] * 400 + [None], n=[1] * 401, d=[{"t": "x"}] * 401,
        chat=[[{"role": "user"}]] * 401,
        bad=pa.array([b"\xff"] * 401).view(pa.binary()).cast(pa.string(), safe=False),
    )  # fmt: skip
    for column, message in {
        "text": ", row 401: 'text' is null, not text; fix or delete the row",
        "body": r": has no 'body', it has text \(a text\), n \(int64\), d.t \(a text\), chat \(a list of \{role\}\)",
        "n": ": 'n' is int64, not text",
        "chat": r": 'chat' is a list of \{role\}, not text; write the turns of each chat as one text",
        "d": ": 'd' is an object, not text; name the column with --text-column d.t$",
        "bad": ", rows 1 to 300: 'bad' is not UTF-8",
    }.items():
        with pytest.raises(UserError, match=f"^{path}{message}"):
            rows(path, column)
    content = path.read_bytes()
    stream = arrow(tmp_path / "t.arrow", pa.table({"text": ["a"] * 999}), pa.ipc.new_stream).read_bytes()
    for name, damaged in (
        ("t.parquet", content[: len(content) // 2]), ("t.parquet", b""), ("t.parquet", b"PAR1 no PAR1"),
        ("t.parquet", content[:4] + bytes(len(content) - 300) + content[-296:]),
        ("t.arrow", b"x\n"), ("t.arrow", stream[: len(stream) // 2]), ("t.arrow", b"ARROW1"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=rf"{name}: is damaged or incomplete \(.+\); copy or download it again"):
            rows(written(tmp_path / name, damaged))


@pytest.mark.parametrize("path", sorted(FOUND.glob("crash-*")), ids=lambda path: path.name)
def test_a_file_that_crashes_its_library_is_one_message(path: Path) -> None:
    """Found by changing bytes: SIGABRT, SIGSEGV and SIGBUS inside of pyarrow."""
    message = rf"{path.name}: is damaged( or incomplete)? \(.+\); copy or download it again"
    with pytest.raises(UserError, match=message):
        rows(path)


def test_a_parquet_file_is_read_in_batches_of_bounded_size(tmp_path: Path) -> None:
    """Many short rows at once, few long ones, also where a file begins with short ones."""
    texts = [f"row {i}\n" for i in range(20_000)] + [f"{i:06}" * 50_000 for i in range(20)]
    path = tmp_path / "t.parquet"
    with pa.parquet.ParquetWriter(path, pa.schema([("text", pa.string())])) as file:
        file.write_table(pa.table({"text": texts[:20_000]}))
        file.write_table(pa.table({"text": texts[20_000:]}))
    (file,) = candidates(path, ("t.parquet",))
    batches = list(read_rows([file.file], "parquet", "text", None))
    assert [text for batch in batches for text in batch] == texts
    assert max(map(len, batches)) == 8192
    assert max(len(batch.data) for batch in batches) <= 3_300_000
