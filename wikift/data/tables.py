"""Columns of text in Parquet and Arrow files, and which fields a row has, for messages about those that are missing."""

from __future__ import annotations

import contextlib
import math
import re
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from wikift.base.errors import UserError
from wikift.data.open_file import BLOCK_BYTES, TextFile, faults
from wikift.data.texts import Texts

TABLES = ("parquet", "arrow")
_COLUMN_BYTES, _COLUMN_ROWS = 5 << 19, 8192  # a batch of a column: large, as each chunk of `encode` has a price
_LISTED = 12


# --- one row -----------------------------------------------------------------------------------------------------


def text_of(row: Any, column: str, where: str) -> str:
    """The text in `column` of a row, a dictionary; "a.b" is the field b of the field a."""
    text = _value(row, column) if isinstance(row, dict) else None
    if isinstance(text, str):
        return text
    if not isinstance(row, dict):
        raise UserError(f'{where}: is {_kind(row)}, not an object; each row must be like {{"{column}": "its text"}}')
    fields = dict(_fields(row))
    if text is None and column not in fields:
        problem = f"{where}: has no {column!r}, it has {_listed(fields)}"
    else:
        problem = f"{where}: {column!r} is {_kind(text)}, not text"
        fields = {name: kind for name, kind in fields.items() if name.startswith(f"{column}.")} or fields
    texts = [name for name, kind in fields.items() if kind == "a text"]
    if texts and column not in fields:
        name = texts[0] if len(texts) == 1 and re.fullmatch(r"[\w.-]{1,40}", texts[0]) else "NAME"
        raise UserError(f"{problem}; name the column with --text-column {name}")
    if any("{" in kind for kind in fields.values()):
        way = "write the turns of each chat as one text, for example by a chat template, into a field of its own"
        raise UserError(f"{problem}; {way}, and name that with --text-column")
    raise UserError(f"{problem}; fix or delete the row, or name another column with --text-column")


def _value(row: Any, column: str) -> Any:
    """Of the field `column`, or of the field that its parts lead to; None where there is none."""
    if column in row:
        return row[column]
    for name in column.split("."):
        row = row.get(name) if isinstance(row, dict) else None
    return row


def _fields(row: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in row.items():
        if isinstance(value, dict) and value:
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _kind(value)


def _kind(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return f"a list of {{{', '.join(map(str, value[0]))}}}"
    kinds = {"NoneType": "null", "bool": "true or false", "list": "a list", "dict": "an object", "str": "a text"}
    return kinds.get(type(value).__name__, "a number" if isinstance(value, (int, float)) else str(value))


def _listed(fields: dict[str, str]) -> str:
    shown = [f"{name[:40]} ({kind})" for name, kind in list(fields.items())[:_LISTED]]
    return ", ".join(shown) + (", ..." if len(fields) > _LISTED else "") or "nothing"


# --- columns -----------------------------------------------------------------------------------------------------


def read_table(file: TextFile, stream: Any, column: str) -> Iterator[Texts]:
    """The texts of `column`, a few million bytes at a time. Other than in place, the file is copied to read it."""
    with contextlib.ExitStack() as stack:
        source: Any = str(file.path)
        if not file.in_place:
            source = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(stream, source, BLOCK_BYTES)
            source.seek(0)
        number = 0
        for texts in _column(file, stack.enter_context(_opened(file, source)), column):
            if texts.null_count:
                where = f"{file}, row {number + texts.is_null().index(True).as_py() + 1}"
                raise UserError(f"{where}: {column!r} is null, not text; fix or delete the row")
            try:
                yield Texts.of_arrow(texts)
            except UnicodeDecodeError:
                where = f"{file}, rows {number + 1} to {number + len(texts)}"
                raise UserError(f"{where}: {column!r} is not UTF-8 everywhere; write the file again") from None
            number += len(texts)


def check_table(file: TextFile, column: str) -> int:
    """About how many bytes of text `column` holds. Raises UserError where the file is damaged or has no such text."""
    with faults(file), _opened(file, str(file.path)) as table:
        path = _path(file, _schema(table), column)
        if not hasattr(table, "num_row_groups"):
            return file.size or 0
        groups = [table.metadata.row_group(number) for number in range(table.num_row_groups)]
        return sum(_bytes(group, path) for group in groups)


@contextlib.contextmanager
def _opened(file: TextFile, source: Any) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet

    if file.head.startswith(b"PAR1") or ".parquet" in file.parts[-1]:
        with pa.parquet.ParquetFile(source, pre_buffer=False, buffer_size=BLOCK_BYTES) as table:
            yield table
        return
    with pa.memory_map(source) if isinstance(source, str) else pa.PythonFile(source, "r") as data:
        yield pa.ipc.open_file(data) if file.head.startswith(b"ARROW1") else pa.ipc.open_stream(data)


def _schema(table: Any) -> Any:
    return getattr(table, "schema_arrow", None) or table.schema


def _column(file: TextFile, table: Any, column: str) -> Iterator[Any]:
    """The arrays of `column`; none across row groups, as a stretch of long rows shows in its group's size."""
    import pyarrow.compute

    path = _path(file, _schema(table), column)
    for batch in _parquet_batches(table, path) if hasattr(table, "num_row_groups") else _arrow_batches(table):
        array = batch.column(path[0])
        for name in path[1:]:
            array = pyarrow.compute.struct_field(array, name)
        yield array


def _parquet_batches(table: Any, path: list[str]) -> Iterator[Any]:
    for number in range(table.num_row_groups):
        group = table.metadata.row_group(number)
        rows = rows_at_once(group.num_rows, _bytes(group, path))
        yield from table.iter_batches(rows, row_groups=[number], columns=[".".join(path)], use_threads=False)


def _arrow_batches(table: Any) -> Iterator[Any]:
    count = getattr(table, "num_record_batches", None)
    for batch in table if count is None else (table.get_batch(number) for number in range(count)):
        rows = rows_at_once(batch.num_rows, batch.nbytes)
        yield from (batch.slice(start, rows) for start in range(0, batch.num_rows, rows))


def rows_at_once(rows: int, size: int) -> int:
    """Into how long parts to divide `rows` of `size` bytes: 2.6 million bytes and no more than 8,192 rows each."""
    return max(1, min(_COLUMN_ROWS, math.ceil(rows / max(1, round(size / _COLUMN_BYTES)))))


def _bytes(group: Any, path: list[str]) -> int:
    chunks = (group.column(number) for number in range(group.num_columns))
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == ".".join(path))


def _path(file: TextFile, schema: Any, column: str) -> list[str]:
    """The names that lead to `column`. Raises UserError, with the fields, where they lead to no text."""
    row = {field.name: _example(field.type) for field in schema}
    text_of(row, column, f"{file}")
    return [column] if column in row else column.split(".")


def _example(kind: Any) -> Any:
    """A value of an Arrow type, as text_of has it."""
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    if types.is_struct(kind):
        return {field.name: _example(field.type) for field in kind}
    if types.is_list(kind) or types.is_large_list(kind):
        return [_example(kind.value_type)]
    return "" if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) else kind
