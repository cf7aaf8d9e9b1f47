"""Texts end to end in one buffer, as Arrow has them: no Python string is made until somebody asks for one.

Also the count of words as `str.split()` has it, on the bytes, and the text of one row, a dictionary.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wikift.base.errors import UserError

# White space beyond ASCII, for str.split(), by the bytes of its UTF-8: two, whatever comes next, or three.
_WIDE_SPACES = np.zeros((0xE4, 256, 256), np.bool_)
for _character in (0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000):
    _WIDE_SPACES[tuple(chr(_character).encode())] = True


@dataclass(frozen=True)
class Texts:
    """Text i is the UTF-8 at `data[offsets[i]:offsets[i + 1]]`; data is uint8, offsets int64, from 0 to the end."""

    data: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]

    @classmethod
    def of(cls, texts: Iterable[str]) -> Texts:
        """Python strings in a buffer. Raises UnicodeEncodeError for half of a surrogate pair."""
        encoded = [text.encode() for text in texts]
        offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), offsets)

    @classmethod
    def of_arrow(cls, column: Any) -> Texts:
        """An Arrow array (or chunked array) of strings, none null. Raises UnicodeError for what is no UTF-8."""
        import pyarrow as pa

        column = column.cast(pa.large_string())
        column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            raise UnicodeError(*error.args) if "UTF8" in str(error) else error from None
        if not len(column):
            return cls.of(())
        _, raw_offsets, raw = column.buffers()
        offsets = np.frombuffer(raw_offsets, np.int64)[column.offset : column.offset + len(column) + 1]
        data = np.frombuffer(raw, np.uint8) if raw is not None else np.empty(0, np.uint8)
        return cls(data[offsets[0] : offsets[-1]], offsets - offsets[0])

    @classmethod
    def joined(cls, parts: Sequence[Texts]) -> Texts:
        if len(parts) == 1:
            return parts[0]
        ends = np.cumsum([0, *(len(part.data) for part in parts)])
        offsets = [part.offsets[1:] + end for part, end in zip(parts, ends, strict=False)]
        return cls(np.concatenate([part.data for part in parts]), np.concatenate([np.zeros(1, np.int64), *offsets]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __iter__(self) -> Iterator[str]:
        data = self.data.tobytes()
        ends = self.offsets.tolist()
        return (data[start:end].decode() for start, end in itertools.pairwise(ends))

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """In bytes."""
        return np.diff(self.offsets)

    @property
    def ends_with_newline(self) -> bool:
        return len(self.data) > 0 and self.data[-1] == ord("\n")

    def kept(self, which: npt.NDArray[np.bool_]) -> Texts:
        if which.all():
            return self
        lengths = self.lengths
        return Texts(self.data[np.repeat(which, lengths)], np.cumsum([0, *lengths[which]], dtype=np.int64))


def count_words(texts: Texts) -> int:
    """The sum of `len(text.split())`: positions without white space after white space or at a text's start."""
    data = texts.data
    space = (data - np.uint8(9) < 5) | (data - np.uint8(28) < 5)
    lead = np.flatnonzero(data & np.uint8(0xDC) == 0xC0)  # 0xC0 to 0xC3 and 0xE0 to 0xE3, where wide white space starts
    wide = lead[_WIDE_SPACES[data[lead], data[lead + 1], data[np.minimum(lead + 2, len(data) - 1)]]]
    space[wide] = space[wide + 1] = True
    space[wide[data[wide] > 0xC3] + 2] = True
    before = np.empty_like(space)
    before[1:] = space[:-1]
    before[texts.offsets[:-1][texts.lengths > 0]] = True
    return int(np.count_nonzero(before > space))


# --- one row -----------------------------------------------------------------------------------------------------

_LISTED = 12  # fields, in a message


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
