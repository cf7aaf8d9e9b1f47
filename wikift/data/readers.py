"""Rows of text out of the user's files, in batches and in bounded memory: lines, JSON, CSV, Parquet and Arrow.

A row of a text file is a line with its "\\n"; "\\r\\n" is read as "\\n", and nothing else ends a line. A line longer
than a million characters is several rows, each but the last without "\\n", divided before white space where there is
some. Rows of the others are documents. Every fault is a UserError with file, line or row, and fix. Texts come as UTF-8
in one buffer and not as Python strings (`texts`).
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from wikift.base.errors import UserError
from wikift.data.open_file import TextFile, decoded, faults, streams
from wikift.data.tables import TABLES, table_rows
from wikift.data.texts import Texts, text_of

_BATCH_CHARACTERS = 1 << 20
_ROW_CHARACTERS, _SEARCHED = 1 << 20, 1 << 16  # of a longer line's rows; how far behind that white space is looked for
_LINE_CHARACTERS = _ROW_CHARACTERS + _SEARCHED  # longer lines are divided
_ROW = re.compile(
    rf"[^\n]{{0,{_LINE_CHARACTERS}}}\n|[^\n]{{1,{_LINE_CHARACTERS}}}\Z"
    rf"|[^\n]{{{_ROW_CHARACTERS}}}(?:[^\n]{{0,{_SEARCHED}}}?\S(?=[ \t\r]))?"
)
_DELIMITERS = ",\t;|"
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\r\n]*")


def read_rows(files: Sequence[TextFile], kind: str, column: str, encoding: str | None) -> Iterator[Texts]:
    """The rows of all `files`, which are of one kind, one text for each row.

    `column` is where documents have their text, and has no meaning for lines; `encoding` as in `decoded`.
    """
    if kind in TABLES:
        yield from table_rows(files, column)
        return
    for number, (file, stream) in enumerate(streams(files), 1):
        with faults(file):
            blocks = decoded(file, stream, encoding)
            if kind == "lines":
                yield from _lines(blocks if number == len(files) else _ended(blocks))
            else:
                rows = _json_rows(file, blocks, column) if kind == "json" else _csv_rows(file, blocks, column)
                yield from _packed(file, rows)


def _ended(blocks: Iterable[str]) -> Iterator[str]:
    """A line ends with its file, also if another file follows."""
    last = "\n"
    for block in blocks:
        yield block
        last = block[-1:] or last
    if last != "\n":
        yield "\n"


def _lines(blocks: Iterable[str]) -> Iterator[Texts]:
    held = ""  # of a line whose end has not come
    for block in _without_returns(blocks):
        text = held + block
        end = text.rfind("\n") + 1
        held = text[end:]
        if end:
            yield _split(text[:end])
        while len(held) > _LINE_CHARACTERS + 2 and (row := _ROW.match(held)):  # decided, whatever comes
            yield Texts.of((row[0],))
            held = held[row.end() :]
    if held:
        yield _split(held)


def _without_returns(blocks: Iterable[str]) -> Iterator[str]:
    held = ""
    for block in blocks:
        text = held + block
        held = "\r" if text.endswith("\r") else ""  # its "\n" may be in the next block
        yield text[: len(text) - len(held)].replace("\r\n", "\n")
    yield held


def _split(text: str) -> Texts:
    data = np.frombuffer(text.encode(), np.uint8)
    ends = np.flatnonzero(data == ord("\n")) + 1
    rest = [] if len(ends) and ends[-1] == len(data) else [len(data)]
    texts = Texts(data, np.concatenate((np.zeros(1, np.int64), ends, rest), dtype=np.int64, casting="unsafe"))
    return texts if texts.lengths.max() <= _ROW_CHARACTERS else Texts.of(_ROW.findall(text))


# --- documents ---------------------------------------------------------------------------------------------------


def _packed(file: TextFile, rows: Iterable[str]) -> Iterator[Texts]:
    rows, number = iter(rows), 0
    while True:
        batch: list[str] = []
        size = 0
        for text in rows:
            batch.append(text)
            size += len(text)
            if size >= _BATCH_CHARACTERS:
                break
        if not batch:
            return
        try:
            yield Texts.of(batch)
        except UnicodeEncodeError:
            odd = next(i for i, text in enumerate(batch, number + 1) if re.search("[\ud800-\udfff]", text))
            raise UserError(
                f"{file}, row {odd}: holds half of a surrogate pair (\\ud800 to \\udfff), which is not text; fix it"
            ) from None
        number += len(batch)


# --- CSV ---------------------------------------------------------------------------------------------------------


def _csv_rows(file: TextFile, blocks: Iterable[str], column: str) -> Iterator[str]:
    """The fields of `column`, which the first line names; the delimiter is the one that divides that line best."""
    lines = _split_lines(blocks)
    first = next((line for line in lines if line.strip()), "")

    def fields(delimiter: str) -> list[str]:
        return [name.strip() for name in next(csv.reader([first], delimiter=delimiter), [])]

    if not first:
        return
    csv.field_size_limit(1 << 27)
    rows = csv.reader(())
    try:
        delimiter = max(_DELIMITERS, key=lambda each: (column in fields(each), len(fields(each))))
        names, rows = fields(delimiter), csv.reader(lines, delimiter=delimiter, strict=True)
        text_of(dict.fromkeys(names, ""), column, f"{file}, line 1")
        index = names.index(column)
        for row in rows:
            if len(row) == len(names):
                yield row[index]
            elif row:
                raise UserError(
                    f"{file}, line {rows.line_num + 1}: has {len(row)} fields, the first line {len(names)} "
                    f"(divided by {delimiter!r}); put fields with {delimiter!r} or line ends in quotes"
                )
    except csv.Error as error:
        raise UserError(
            f"{file}, line {rows.line_num + 1}: is not CSV ({error}); put fields with quotes in quotes, each of theirs "
            "doubled, or save the text as .jsonl"
        ) from None


def _split_lines(blocks: Iterable[str]) -> Iterator[str]:
    held = ""
    for block in blocks:
        *complete, held = (held + block).split("\n")
        for line in complete:
            yield line + "\n"
    if held:
        yield held


# --- JSON --------------------------------------------------------------------------------------------------------


def _json_rows(file: TextFile, blocks: Iterable[str], column: str) -> Iterator[str]:
    """The texts of `column` in objects one after the other, in a list, or in the only list of an object.

    Holds one row and one block of text; all of the file in the last case.
    """
    scanner = _Scanner(file, iter(blocks))
    for number, row in enumerate(_objects(scanner, column), 1):
        text = row.get(column) if type(row) is dict else None
        yield text if type(text) is str else text_of(row, column, scanner.where(number))


def _objects(scanner: _Scanner, column: str) -> Iterator[Any]:
    if scanner.peek() == "[":
        scanner.take("[")
        while scanner.peek() != "]":
            yield scanner.value()
            if scanner.peek() != "]":
                scanner.take(",")
        scanner.take("]")
    elif scanner.peek():
        first = scanner.value()
        fields = first if isinstance(first, dict) and column.partition(".")[0] not in first else {}
        lists = [v for v in fields.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
        if not lists or scanner.peek() or re.search(r"\.(jsonl|ndjson)\b", str(scanner.file)):
            yield first
        elif len(lists) > 1:
            raise UserError(f"{scanner.file}: is an object with {len(lists)} lists; save each in a file of its own")
        else:
            yield from lists[0]
    while scanner.peek():
        yield scanner.value()


class _Scanner:
    """Where in the text reading is; `start` is where the last value began."""

    def __init__(self, file: TextFile, blocks: Iterator[str]) -> None:
        self.file, self.blocks = file, blocks
        self.text, self.at, self.start, self.line = "", 0, 0, 1

    def where(self, row: int = 0) -> str:
        line = self.line + self.text.count("\n", 0, self.start)
        return f"{self.file}, line {line}" + (f", row {row}" if row > line else "")

    def more(self) -> bool:
        """Read on, so that the rest of the text is twice as long and more; whether there was more."""
        kept = self.text[self.at :]
        blocks, size = [kept], len(kept)
        while size <= 2 * len(kept) and (block := next(self.blocks, None)) is not None:
            blocks.append(block)
            size += len(block)
        if len(blocks) == 1:
            return False
        self.line += self.text.count("\n", 0, self.at)
        self.text, self.at, self.start = "".join(blocks), 0, 0
        return True

    def peek(self) -> str:
        """The next character that is not white space; none at the end."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]  # it matches nothing too
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def value(self) -> Any:
        self.peek()
        while True:
            self.start = self.at
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except (json.JSONDecodeError, RecursionError) as error:
                message = getattr(error, "msg", str(error))
                cut = message.startswith("Unterminated") or getattr(error, "pos", 0) > len(self.text) - 12
                if cut and self.more():
                    continue
                raise self.fault(message) from None
            if end < len(self.text) or not self.more():
                self.at = end
                return value

    def take(self, character: str) -> None:
        if self.peek() != character:
            self.start = self.at
            raise self.fault(f"expecting {character!r}")
        self.at += 1

    def fault(self, message: str) -> UserError:
        fix = "a JSON file has one object on each line, or a list of objects"
        return UserError(f"{self.where()}: is not JSON ({message}); {fix}")
