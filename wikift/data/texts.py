"""Texts end to end in one buffer, as Arrow has them: no Python string is made until somebody asks for one.

Also the count of words as `str.split()` has it, on the bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_BLOCK_BYTES = 1 << 18  # so that what is counted stays in a core's cache

# White space beyond ASCII, for str.split(): U+0085 and U+00A0, whose UTF-8 starts with 0xC2, and U+1680, U+2000 to
# U+200A, U+2028, U+2029, U+202F, U+205F and U+3000, of three bytes.
_THREE_BYTES = np.zeros(0x30000, np.bool_)  # by the three bytes, from 0xE10000 on
for _character in (0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000):
    _THREE_BYTES[int.from_bytes(chr(_character).encode(), "big") - 0xE10000] = True


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
        """An Arrow array (or chunked array) of strings, none null. Raises UnicodeDecodeError for what is no UTF-8."""
        import pyarrow as pa

        column = column.cast(pa.large_string())
        column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:
            column.to_pylist()  # says which byte
            raise
        if not len(column):
            return cls.of(())
        _, raw_offsets, raw = column.buffers()
        offsets = np.frombuffer(raw_offsets, np.int64)[column.offset : column.offset + len(column) + 1]
        data = np.frombuffer(raw, np.uint8) if raw is not None else np.empty(0, np.uint8)
        return cls(data[offsets[0] : offsets[-1]], offsets - offsets[0])

    @classmethod
    def joined(cls, parts: Sequence[Texts]) -> Texts:
        """The texts of all `parts`, in order."""
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
        """Only those that `which` says."""
        if which.all():
            return self
        lengths = self.lengths
        return Texts(self.data[np.repeat(which, lengths)], np.cumsum([0, *lengths[which]], dtype=np.int64))


def count_words(texts: Texts) -> int:
    """The sum of `len(text.split())`: positions without white space, and a text's start or white space before it."""
    data, count, before = texts.data, 0, True
    space = np.empty(len(data), np.bool_)
    for start in range(0, len(data), _BLOCK_BYTES):
        block = data[start : start + _BLOCK_BYTES]
        mask = np.less(block - np.uint8(9), 5, out=space[start : start + len(block)])
        mask |= block - np.uint8(28) < 5
    _mark_beyond_ascii(data, space)
    for start in range(0, len(data), _BLOCK_BYTES):
        mask = space[start : start + _BLOCK_BYTES]
        count += int(before and not mask[0]) + int(np.count_nonzero(mask[:-1] > mask[1:]))
        before = bool(mask[-1])
    starts = texts.offsets[:-1][texts.lengths > 0]
    starts = starts[starts > 0]
    return count + int(np.count_nonzero(~space[starts] & ~space[starts - 1]))  # one text's last word, another's first


def _mark_beyond_ascii(data: npt.NDArray[np.uint8], space: npt.NDArray[np.bool_]) -> None:
    """Set `space` at every byte of the characters of white space that are not ASCII."""
    for start in range(0, len(data), _BLOCK_BYTES):
        block = data[start : start + _BLOCK_BYTES]
        first = np.flatnonzero(block & np.uint8(0xDC) == 0xC0) + start  # 0xC0 to 0xC3 and 0xE0 to 0xE3, in two passes
        lead = data[first]
        first = first[(lead == 0xC2) | (lead > 0xE0)]
        if not len(first):
            continue
        lead, second = data[first], data[first + 1]  # UTF-8 is whole: one or two bytes more are there
        two = first[(lead == 0xC2) & ((second == 0x85) | (second == 0xA0))]
        space[two] = space[two + 1] = True
        long = lead != 0xC2
        three = first[long]
        code = (lead[long] - np.uint8(0xE1)).astype(np.int32) << 16 | second[long].astype(np.int32) << 8
        three = three[_THREE_BYTES[code | data[three + 2]]]
        space[three] = space[three + 1] = space[three + 2] = True
