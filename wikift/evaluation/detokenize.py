"""WikiText's spaced-out text -> running text, by the rules of lm-evaluation-harness' and Megatron-LM's detokenizer.

The rules apply to a page as one string, one rule after another. A page of more than a million characters is processed
in parts to bound memory. It is cut between two letters where no bracket or quotation mark is open, which changes no
rule's match. (OpenAI's own detokenizer was never published; these are the rules that others have used since. They
can't be inverted: " N " becomes " 1 ".)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

PART_CHARACTERS = 1_000_000
_MOST_PARTS_HELD = 4  # text without a safe position to cut at is cut all the same once it is this long

_BEFORE_BRACKETS = (
    ("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), (" : ", ": "), (" ; ", "; "), (" . ", ". "),
    (" ! ", "! "), (" ? ", "? "), (" , ", ", "),
)  # fmt: skip
_PAIRS = (("(", ")"), ("[", "]"), ("{", "}"), ('"', '"'), ("'", "'"))
_AFTER_BRACKETS = (
    ("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"), (" \n", "\n"),
    ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s"),
)  # fmt: skip
_INSIDE_A_WORD = re.compile(r"\w(?=\w)")


class Part(NamedTuple):
    """Text of one `document`. A unit is what the tokenizer gets at once (a row, a page or everything): `ends` it?"""

    text: str
    ends: bool
    document: int


def detokenized(text: str) -> str:
    """`text` as running text, every rule applied to all of it."""
    for spaced, close in _BEFORE_BRACKETS:
        text = text.replace(spaced, close)
    # the original's pattern has its brackets escaped on one side only, and acts on this literal text alone
    text = re.sub(r"/' [0-9]/", "/'[0-9]/", text)
    for opening, closing in _PAIRS:
        parts, at = [], 0
        for start, end in _pairs(text, opening, closing):
            parts += [text[at:start], opening, text[start + 1 : end].strip(), closing]
            at = end + 1
        text = "".join(parts) + text[at:]
    for spaced, close in _AFTER_BRACKETS:
        text = text.replace(spaced, close)
    return text


def detokenized_parts(parts: Iterable[Part]) -> Iterator[Part]:
    """Parts of pages -> the same pages detokenized, in parts of about a million characters."""
    held: list[str] = []
    size, limit = 0, PART_CHARACTERS
    for text, ends, document in parts:
        held.append(text)
        size += len(text)
        if not ends and size <= limit:
            continue
        page = "".join(held)
        cut = size if ends else safe_cut(page)
        if not cut and size <= _MOST_PARTS_HELD * PART_CHARACTERS:
            limit = 2 * size  # a few tries only: each reads everything that is held
            continue
        yield Part(detokenized(page[: cut or size]), ends, document)
        held, limit = [page[cut or size :]], PART_CHARACTERS
        size = len(held[0])


def safe_cut(text: str) -> int:
    """The last position where `text`, the beginning of a page, can be cut without changing a rule's match; 0: none."""
    is_open = np.zeros(len(text) + 1, np.bool_)
    for opening, closing in _PAIRS:
        at = 0
        for start, end in _pairs(text, opening, closing):
            is_open[start : end + 1] = True
            at = end + 1
        if (unclosed := text.find(opening, at)) >= 0:
            is_open[unclosed:] = True
    return max((match.end() for match in _INSIDE_A_WORD.finditer(text) if not is_open[match.end()]), default=0)


def _pairs(text: str, opening: str, closing: str) -> Iterator[tuple[int, int]]:
    """The positions of each opening mark and of the next closing one. Linear in time, whatever is unpaired."""
    at = 0
    while (start := text.find(opening, at)) >= 0 and (end := text.find(closing, start + 1)) >= 0:
        yield start, end
        at = end + 1
