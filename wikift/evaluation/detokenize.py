"""WikiText's spaced-out text -> running text, by the rules of lm-evaluation-harness' and Megatron-LM's detokenizer.

The rules apply to a page as one string, one rule after another. (OpenAI's own detokenizer was never published; these
are the rules that others have used since. They can't be inverted: " N " becomes " 1 ".)
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_BEFORE_BRACKETS = (
    ("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), (" : ", ": "), (" ; ", "; "), (" . ", ". "),
    (" ! ", "! "), (" ? ", "? "), (" , ", ", "),
)  # fmt: skip
_PAIRS = (("(", ")"), ("[", "]"), ("{", "}"), ('"', '"'), ("'", "'"))
_AFTER_BRACKETS = (
    ("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"), (" \n", "\n"),
    ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s"),
)  # fmt: skip


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


def _pairs(text: str, opening: str, closing: str) -> Iterator[tuple[int, int]]:
    """The positions of each opening mark and of the next closing one. Linear in time, whatever is unpaired."""
    at = 0
    while (start := text.find(opening, at)) >= 0 and (end := text.find(closing, start + 1)) >= 0:
        yield start, end
        at = end + 1
