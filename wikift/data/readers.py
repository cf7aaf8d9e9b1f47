"""Rows of text out of the user's files, in batches, with bounded memory: .txt, .jsonl and .parquet.

A row of a `.txt` file is a line with its "\\n"; "\\r\\n" is read as "\\n", a byte-order mark is dropped, and nothing
else ends a line. A line longer than a million characters is several rows, each but the last without "\\n", divided
before white space where there is some. Rows of the other two are documents. Every fault is a UserError with file, line
and fix. Texts come as UTF-8 in one buffer and not as Python strings (`texts`).
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from wikift.base.errors import UserError, one_line
from wikift.data.texts import Texts

_BLOCK_BYTES = 1 << 20
_BATCH_CHARACTERS = 1 << 20
_ROW_CHARACTERS, _SEARCHED = 1 << 20, 1 << 16  # of a longer line's rows; how far behind that white space is looked for
_LINE_CHARACTERS = _ROW_CHARACTERS + _SEARCHED  # longer lines are divided
_ROW = re.compile(
    rf"[^\n]{{0,{_LINE_CHARACTERS}}}\n|[^\n]{{1,{_LINE_CHARACTERS}}}\Z"
    rf"|[^\n]{{{_ROW_CHARACTERS}}}(?:[^\n]{{0,{_SEARCHED}}}?\S(?=[ \t\r]))?"
)
_COLUMN_BYTES, _COLUMN_ROWS = 5 << 19, 8192  # a batch of a column: large, as each chunk of `encode` has a price

Reader = Callable[[Path, str], Iterator[Texts]]


def read_lines(path: Path, column: str = "") -> Iterator[Texts]:
    """The lines of a text file, each with its "\\n"; `column` has no meaning here."""
    held = ""  # of a line whose end has not come
    for block in _decoded(path):
        text = held + block
        end = text.rfind("\n") + 1
        held = text[end:]
        if end:
            yield _lines(text[:end])
        while len(held) > _LINE_CHARACTERS + 2 and (row := _ROW.match(held)):  # decided, whatever comes
            yield Texts.of((row[0],))
            held = held[row.end() :]
    if held:
        yield _lines(held)


def _lines(text: str) -> Texts:
    data = np.frombuffer(text.encode(), np.uint8)
    ends = np.flatnonzero(data == ord("\n")) + 1
    rest = [] if len(ends) and ends[-1] == len(data) else [len(data)]
    texts = Texts(data, np.concatenate((np.zeros(1, np.int64), ends, rest), dtype=np.int64, casting="unsafe"))
    return texts if texts.lengths.max() <= _ROW_CHARACTERS else Texts.of(_ROW.findall(text))


def _decoded(path: Path) -> Iterator[str]:
    """The file's text in blocks, decoded and with "\\r\\n" as "\\n"."""
    rest, held, offset, line = b"", "", 0, 1
    with _open(path) as file:
        while True:
            block = file.read(_BLOCK_BYTES)
            data = rest + block
            if offset == 0 and data.startswith(codecs.BOM_UTF8):
                data, offset = data[3:], 3
            try:
                text, used = codecs.utf_8_decode(data, "strict", not block)
            except UnicodeDecodeError as error:
                line += data.count(b"\n", 0, error.start)
                raise _not_utf8(path, line, offset + error.start, data[error.start]) from None
            line += data.count(b"\n", 0, used)
            rest, offset = data[used:], offset + used
            text, held = held + text, ""
            if block and text.endswith("\r"):  # its "\n" may be in the next block
                text, held = text[:-1], "\r"
            yield text.replace("\r\n", "\n")
            if not block:
                return


def read_jsonl(path: Path, column: str) -> Iterator[Texts]:
    """The texts of `column`, one JSON object a line; lines of white space alone are skipped."""
    batch: list[str] = []
    size = offset = 0
    with _open(path) as file:
        for number, raw in enumerate(file, 1):
            start, offset = offset, offset + len(raw)
            if number == 1 and raw.startswith(codecs.BOM_UTF8):
                raw, start = raw[3:], 3
            if not raw.strip():
                continue
            batch.append(_text_of(raw, path, number, start, column))
            size += len(batch[-1])
            del raw
            if size >= _BATCH_CHARACTERS:
                yield Texts.of(batch)
                batch, size = [], 0
    if batch:
        yield Texts.of(batch)


def _text_of(raw: bytes, path: Path, number: int, start: int, column: str) -> str:
    where = f"{path}, line {number}"
    try:
        line = raw.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, number, start + error.start, raw[error.start]) from None
    surrogates = "\\ud" in line or "\\uD" in line
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        message = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise UserError(f"{where}: is not JSON ({message}); a .jsonl file has one JSON object on each line") from None
    del line
    if not isinstance(row, dict):
        raise UserError(
            f"{where}: is {_kind(row)}, not an object; each line must be like {{{json.dumps(column)}: ...}}"
        )
    if column not in row:
        raise UserError(f"{where}: has no {column!r}, it has {_list(row)}; name the column with --text-column")
    text = row[column]
    if not isinstance(text, str):
        raise UserError(f"{where}: {column!r} is {_kind(text)}, not text; fix or delete the line")
    if surrogates:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(
                f"{where}: {column!r} holds half of a surrogate pair (\\ud800 to \\udfff), which is not text; fix it"
            ) from None
    return text


def read_parquet(path: Path, column: str) -> Iterator[Texts]:
    """The texts of `column` of a parquet file, a few million bytes at a time."""
    import pyarrow as pa
    import pyarrow.parquet

    if problems := parquet_problems(path, column):
        raise UserError(*problems)
    number = 0
    try:
        with pa.parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BLOCK_BYTES) as file:
            for texts in _column(file, column):
                if texts.null_count:
                    where = f"{path}, row {number + texts.is_null().index(True).as_py() + 1}"
                    raise UserError(f"{where}: {column!r} is null, not text; fix or delete the row")
                try:
                    yield Texts.of_arrow(texts)
                except UnicodeDecodeError:
                    where = f"{path}, row {number + _first_not_text(texts) + 1}"
                    raise UserError(f"{where}: {column!r} is not UTF-8; write the file again") from None
                number += len(texts)
    except (pa.ArrowException, OSError) as error:
        raise UserError(_broken_parquet(path, error)) from None


def rows_at_once(rows: int, size: int) -> int:
    """Into how long parts to divide `rows` of `size` bytes: 2.6 million bytes and no more than 8,192 rows each."""
    return max(1, min(_COLUMN_ROWS, math.ceil(rows / max(1, round(size / _COLUMN_BYTES)))))


def _column(file: Any, column: str) -> Iterator[Any]:
    """The arrays of `column`, none across row groups, since a stretch of long rows shows in its group's size."""
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        rows = rows_at_once(group.num_rows, _column_bytes(group, column))
        for batch in file.iter_batches(rows, row_groups=[number], columns=[column], use_threads=False):
            yield batch.column(0)


def _column_bytes(group: Any, column: str) -> int:
    chunks = (group.column(number) for number in range(group.num_columns))
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == column)


def _first_not_text(texts: Any) -> int:
    for number, text in enumerate(texts):
        try:
            text.as_py()
        except UnicodeDecodeError:
            return number
    return 0


def parquet_problems(path: Path, column: str) -> list[str]:
    """What shows at once: no parquet file, truncated, no such column, or no text in it."""
    import pyarrow as pa
    import pyarrow.parquet

    _open(path).close()
    try:
        schema = pa.parquet.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        return [_broken_parquet(path, error)]
    if schema.names.count(column) != 1:
        return [f"{path}: has no column {column!r}, it has {_list(schema.names)}; name one with --text-column"]
    kind = schema.field(column).type
    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(inner) or pa.types.is_large_string(inner) or pa.types.is_string_view(inner)):
        return [f"{path}: column {column!r} holds {kind}, not text; name another with --text-column"]
    return []


def parquet_bytes(path: Path, column: str) -> int:
    """About how much text `column` holds: its bytes before compression, by the file's metadata."""
    import pyarrow.parquet

    about = pyarrow.parquet.read_metadata(path)
    return sum(_column_bytes(about.row_group(number), column) for number in range(about.num_row_groups))


def _broken_parquet(path: Path, error: Exception) -> str:
    return f"{path}: is not a complete parquet file ({one_line(error)}); copy or download it again"


def _open(path: Path) -> Any:
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); fix the name or the permissions") from None


def _not_utf8(path: Path, line: int, offset: int, byte: int) -> UserError:
    with _open(path) as file:
        marked = file.read(2) in (b"\xff\xfe", b"\xfe\xff")
    encoding = "UTF-16" if marked else "WINDOWS-1252"
    return UserError(
        f"{path}, line {line}: byte 0x{byte:02x} at offset {offset:,} is not UTF-8; save the file as UTF-8, for "
        f"example with iconv -f {encoding} -t UTF-8 {path} > {path.stem}-utf8{path.suffix}"
    )


def _kind(value: Any) -> str:
    kinds = {"NoneType": "null", "bool": "true or false", "list": "a list", "dict": "an object", "str": "a text"}
    return kinds.get(type(value).__name__, "a number")


def _list(names: Any) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") or "nothing"


READERS: dict[str, Reader] = {".txt": read_lines, ".jsonl": read_jsonl, ".parquet": read_parquet}
