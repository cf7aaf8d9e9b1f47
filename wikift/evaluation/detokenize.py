"""WikiText's spaced-out text -> running text, by the rules of lm-evaluation-harness' and Megatron-LM's detokenizer.

The rules are applied to a whole page, one after the other, and a page is of any length: one of more than a million
characters is done in parts. It is cut between two letters where no bracket or quotation mark is open, so the parts are
those of the whole page: every rule then matches on one side of the place or the other. (OpenAI's own detokenizer was
never published; these are the rules that others have used since. They can't be inverted: " N " becomes " 1 ".)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

PART_CHARACTERS = 1_000_000
_HOPELESS_PARTS = 4  # so much without a place to cut at is cut all the same

_BEFORE_BRACKETS = (
    ("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), (" : ", ": "), (" ; ", "; "), (" . ", ". "),
    (" ! ", "! "), (" ? ", "? "), (" , ", ", "),
)  # fmt: skip
_PAIRS = ("()", "[]", "{}", '""', "''")
_AFTER_BRACKETS = (
    ("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"), (" \n", "\n"),
    ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s"),
)  # fmt: skip
_MARK = re.compile(r"[()\[\]{}\"']")
_INSIDE_A_WORD = re.compile(r"\w(?=\w)")

Part = tuple[str, bool, int]


def detokenized(text: str) -> str:
    """`text` as running text, every rule on the whole of it."""
    for spaced, close in _BEFORE_BRACKETS:
        text = text.replace(spaced, close)
    # the original's pattern has its brackets escaped on one side only, and acts on this literal text alone
    text = re.sub(r"/' [0-9]/", "/'[0-9]/", text)
    for pair in _PAIRS:
        text = _tightened(text, pair[0], pair[1])
    for spaced, close in _AFTER_BRACKETS:
        text = text.replace(spaced, close)
    return text


def detokenized_parts(parts: Iterable[Part]) -> Iterator[Part]:
    """(text, ends its page, document) -> the same pages detokenized, in parts of about a million characters."""
    held: list[str] = []
    size, limit = 0, PART_CHARACTERS
    for text, ends, document in parts:
        held.append(text)
        size += len(text)
        if ends:
            yield detokenized("".join(held)), True, document
            held, size, limit = [], 0, PART_CHARACTERS
        elif size > limit:
            page = "".join(held)
            cut = safe_cut(page)
            if not cut and size <= _HOPELESS_PARTS * PART_CHARACTERS:
                limit = 2 * size  # a few tries only: each reads everything that is held
                continue
            yield detokenized(page[: cut or size]), False, document
            held, limit = [page[cut or size :]], PART_CHARACTERS
            size = len(held[0])


def safe_cut(text: str) -> int:
    """The last place where `text`, the beginning of a page, may be cut without changing a rule's match; 0 for none."""
    closing: dict[str, str] = {}  # of each kind of pair that is open, what closes it
    free: list[tuple[int, int]] = []
    since = 0
    for match in _MARK.finditer(text):
        mark = match[0]
        if not closing:
            free.append((since, match.start()))
        pair = next(pair for pair in _PAIRS if mark in pair)
        if pair in closing:
            if mark == pair[1]:
                del closing[pair]
        elif mark == pair[0]:
            closing[pair] = pair[1]
        since = match.end()
    if not closing:
        free.append((since, len(text)))
    for start, end in reversed(free):
        if places := [match.end() for match in _INSIDE_A_WORD.finditer(text, start, end)]:
            return places[-1]
    return 0


def _tightened(text: str, opening: str, closing: str) -> str:
    """No white space behind an opening mark and before the next closing one. Linear in time, whatever is unpaired."""
    parts, at = [], 0
    while (start := text.find(opening, at)) >= 0 and (end := text.find(closing, start + 1)) >= 0:
        parts += [text[at:start], opening, text[start + 1 : end].strip(), closing]
        at = end + 1
    return "".join(parts) + text[at:]
