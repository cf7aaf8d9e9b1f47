"""Texts out of JSON in bounded memory: objects one after the other, in a list, or in the only list of an object."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from wikift.base.errors import UserError
from wikift.data.open_file import TextFile
from wikift.data.tables import text_of

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\r\n]*")
_SHORT = 1 << 22  # characters of an object that is looked at as one


def json_rows(file: TextFile, blocks: Iterable[str], column: str) -> Iterator[str]:
    """The texts of `column`. Holds one row and one block of text."""
    scanner = _Scanner(file, iter(blocks))
    for number, row in enumerate(_objects(scanner, column), 1):
        text = row.get(column) if type(row) is dict else None
        yield text if type(text) is str else text_of(row, column, scanner.where(number))


def _objects(scanner: _Scanner, column: str) -> Iterator[Any]:
    if scanner.peek() == "[":
        yield from scanner.items()
        return
    lists = 0
    if scanner.peek() == "{" and (first := scanner.value(_SHORT)) is not None:
        rows = [value for value in first.values() if _is_rows(value)]
        lines = re.search(r"\.(jsonl|ndjson)\b", str(scanner.file))
        if lines or scanner.peek() or not rows or column.partition(".")[0] in first:
            yield first
        else:
            yield from rows[0]
            lists = len(rows)
    elif scanner.peek() == "{":  # a large one: its lists are read item by item
        row = {}
        for name in scanner.names():
            if scanner.peek() == "[" and column.partition(".")[0] not in row:
                yield from scanner.items()
                lists += 1
            else:
                row[name] = scanner.value()
        if not lists:
            yield row
    if lists > 1:
        raise UserError(f"{scanner.file}: is an object with {lists} lists; save each in a file of its own")
    while scanner.peek():
        yield scanner.value()


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


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
        blocks = [kept]
        for block in self.blocks:
            blocks.append(block)
            if sum(map(len, blocks)) > 2 * len(kept):
                break
        else:
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

    def value(self, longest: int | None = None) -> Any:
        """The next value; None where it is longer than `longest`, and then it is the next one still."""
        self.peek()
        while True:
            self.start = self.at
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except (json.JSONDecodeError, RecursionError) as error:
                message = getattr(error, "msg", str(error))
                cut = message.startswith("Unterminated") or getattr(error, "pos", 0) > len(self.text) - 12
                if longest and cut and len(self.text) - self.at > longest:
                    return None
                if cut and self.more():
                    continue
                fix = "a JSON file has one object on each line, or a list of objects"
                raise UserError(f"{self.where()}: is not JSON ({message}); {fix}") from None
            if end < len(self.text) or not self.more():
                self.at = end
                return value

    def items(self) -> Iterator[Any]:
        yield from (self.value() for _ in self.between("[", "]"))

    def names(self) -> Iterator[str]:
        """The names in the object that comes next; each one's value must be read before the next name."""
        for _ in self.between("{", "}"):
            name = self.value()
            self.take(":")
            yield name

    def between(self, opening: str, closing: str) -> Iterator[None]:
        self.take(opening)
        if self.peek() != closing:
            yield
            while self.peek() == ",":
                self.at += 1
                yield
        self.take(closing)

    def take(self, character: str) -> None:
        if self.peek() != character:
            self.start = self.at
            raise UserError(f"{self.where()}: is not JSON (expecting {character!r}); copy or download the file again")
        self.at += 1
