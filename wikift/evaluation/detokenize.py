"""WikiText's spaced-out text -> running text, by the rules of lm-evaluation-harness' and Megatron-LM's detokenizer.

OpenAI's own detokenizer was never published; these are the rules that others have used since. They can't be inverted:
" N " becomes " 1 ".
"""

from __future__ import annotations

import re

_BEFORE_BRACKETS = (
    ("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), (" : ", ": "), (" ; ", "; "), (" . ", ". "),
    (" ! ", "! "), (" ? ", "? "), (" , ", ", "),
)  # fmt: skip
_PAIRS = ("()", "[]", "{}", '""', "''")
_AFTER_BRACKETS = (
    ("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"), (" \n", "\n"),
    ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s"),
)  # fmt: skip


def detokenized(text: str) -> str:
    """A page as running text."""
    for spaced, close in _BEFORE_BRACKETS:
        text = text.replace(spaced, close)
    # the original's pattern has its brackets escaped on one side only, and acts on this literal text alone
    text = re.sub(r"/' [0-9]/", "/'[0-9]/", text)
    for pair in _PAIRS:
        text = _tightened(text, pair[0], pair[1])
    for spaced, close in _AFTER_BRACKETS:
        text = text.replace(spaced, close)
    return text


def _tightened(text: str, opening: str, closing: str) -> str:
    """Remove white space after an opening mark and before the next closing one. Linear in time, paired or not."""
    parts, at = [], 0
    while (start := text.find(opening, at)) >= 0 and (end := text.find(closing, start + 1)) >= 0:
        parts += [text[at:start], opening, text[start + 1 : end].strip(), closing]
        at = end + 1
    return "".join(parts) + text[at:]
