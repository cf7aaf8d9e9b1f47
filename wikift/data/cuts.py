"""Long rows in pieces: a call of `tokenizers` takes 100 bytes and more for each character.

A row is cut only for tokenizers that split text as GPT-2's does, and only where they split it for certain:

    's|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+

A match has white space at its start or is nothing else, so one ends wherever white space follows another character. A
stretch without white space stays in one piece. As words end there too, their number is the sum over the pieces.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

LONG_CHARACTERS = 64_000
_CUT = re.compile(r"\S(?=[ \t\n\r])")


def splits_at_spaces(tokenizer_file: Path) -> bool:
    """Whether a row may be cut before white space for this tokenizer: only if it splits text as GPT-2's does."""
    content = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    before, added = content.get("pre_tokenizer") or {}, content.get("added_tokens") or []
    return bool(
        content["model"].get("type") == "BPE"
        and content.get("normalizer") is None
        and before.get("type") == "ByteLevel"
        and before.get("use_regex", True)
        and not before.get("add_prefix_space", True)
        and not any(token.get(flag) for token in added for flag in ("lstrip", "rstrip", "single_word"))
        and not any(re.search(r"\s", token["content"]) for token in added)
    )


def pieces(texts: Iterable[tuple[str, bool]], *, cut: bool = True) -> Iterator[tuple[str, bool]]:
    """(text, ends its unit) -> (text, ends its unit): units in one piece each, or cut after 64,000 characters or more.

    Holds one piece and one text; a whole unit where nothing is to be cut.
    """
    held: list[str] = []
    size = 0
    for text, ends in texts:
        held.append(text)
        size += len(text)
        if cut and size > LONG_CHARACTERS:
            joined, start = "".join(held), 0
            while match := _CUT.search(joined, start + LONG_CHARACTERS - 1):
                yield joined[start : match.end()], False
                start = match.end()
            held = [joined[start:]]
            size = len(held[0])
        if ends:
            yield "".join(held), True
            held, size = [], 0
