"""Columns of text in Parquet and Arrow files, read in a process of its own: a changed byte crashes pyarrow, for one
file in a hundred.

The process writes frames to its standard output: two sizes, then the bytes and offsets of texts, as `Texts` has them.
Where the first size is -1 the second is that of a JSON object: {"file": NAME} that begins, {"size": N} of one that was
checked, {"problems": [...]} or {} at the end.
"""

from __future__ import annotations

import contextlib
import json
import math
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wikift.base.errors import UserError, one_line
from wikift.data.open_file import BLOCK_BYTES, TextFile, faults, streams
from wikift.data.texts import Texts, text_of

TABLES = ("parquet", "arrow")
_COLUMN_BYTES, _COLUMN_ROWS = 5 << 19, 8192  # a batch of a column: large, as each chunk of `encode` has a price
_SIZES = struct.Struct("<qq")
# isolated (-I): nothing is imported from the current folder that this process would not import
_PROGRAM = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from wikift.data import tables as t; t.serve()"


def table_rows(files: Sequence[TextFile], column: str) -> Iterator[Texts]:
    """The texts of `column`, in order. Raises UserError for a file that is damaged or has no such text."""
    return _answers(files, column, check=False)


def table_sizes(files: Sequence[TextFile], column: str) -> list[int]:
    """About how many bytes of text `column` has in each file, read in place. Raises UserError as `table_rows` does."""
    return list(_answers(files, column, check=True)) if files else []


def _answers(files: Sequence[TextFile], column: str, *, check: bool) -> Iterator[Any]:
    asked = [(str(file.path), file.member, file.head[:8].hex(), file.size) for file in files]
    command, pipe = [sys.executable, "-I", "-c", _PROGRAM, json.dumps(sys.path)], subprocess.PIPE
    name = str(files[0])
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps([asked, column, check]).encode())
            process.stdin.close()
            while len(head := process.stdout.read(_SIZES.size)) == _SIZES.size:
                first, second = _SIZES.unpack(head)
                data, rest = process.stdout.read(max(0, first)), process.stdout.read(second)
                if len(data) + len(rest) != max(0, first) + second:
                    break
                if first >= 0:
                    yield Texts(np.frombuffer(data, np.uint8), np.frombuffer(rest, np.int64))
                    continue
                answer = json.loads(rest)
                name = answer.get("file", name)
                if "size" in answer:
                    yield answer["size"]
                elif "problems" in answer:
                    raise UserError(*answer["problems"])
                elif not answer:
                    return
        finally:
            process.kill()
    raise UserError(f"{name}: is damaged (reading it crashed); copy or download it again")


# --- in that process ---------------------------------------------------------------------------------------------


def serve() -> None:
    """Read what standard input asks for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who asked ends this
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    asked, column, check = json.load(sys.stdin)
    files = [TextFile(Path(path), member, bytes.fromhex(head), size) for path, member, head, size in asked]
    file, out = files[0], sys.stdout.buffer
    try:
        for file, stream in ((file, None) for file in files) if check else streams(files):
            _send({"file": str(file)})
            if check:
                _send({"size": _size(file, column)})
                continue
            with faults(file):
                for texts in _texts(file, stream, column):
                    out.write(_SIZES.pack(texts.data.nbytes, texts.offsets.nbytes))
                    out.write(texts.data.data)
                    out.write(texts.offsets.data)
        _send({})
    except UserError as error:
        _send({"problems": error.problems})
    except Exception as error:  # of pyarrow: a damaged file has it raise nearly everything
        _send({"problems": [f"{file}: is damaged or incomplete ({one_line(error)}); copy or download it again"]})


def _send(answer: dict[str, Any]) -> None:
    text = json.dumps(answer).encode()
    sys.stdout.buffer.write(_SIZES.pack(-1, len(text)) + text)
    sys.stdout.buffer.flush()


def _texts(file: TextFile, stream: Any, column: str) -> Iterator[Texts]:
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
            except UnicodeError:
                where = f"{file}, rows {number + 1} to {number + len(texts)}"
                raise UserError(f"{where}: {column!r} is not UTF-8 everywhere; write the file again") from None
            number += len(texts)


def _size(file: TextFile, column: str) -> int:
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

    if file.head.startswith(b"PAR1") or (".parquet" in file.parts[-1] and not file.head.startswith(b"ARROW1")):
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
        rows = _rows_at_once(group.num_rows, _bytes(group, path))
        yield from table.iter_batches(rows, row_groups=[number], columns=[".".join(path)], use_threads=False)


def _arrow_batches(table: Any) -> Iterator[Any]:
    count = getattr(table, "num_record_batches", None)
    for batch in table if count is None else (table.get_batch(number) for number in range(count)):
        rows = _rows_at_once(batch.num_rows, batch.nbytes)
        yield from (batch.slice(start, rows) for start in range(0, batch.num_rows, rows))


def _rows_at_once(rows: int, size: int) -> int:
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
