"""Rows longer than 64,000 characters in pieces: a call of the tokenizer takes 100 bytes and more for each character.

They are cut only where GPT-2's pre-tokenizer splits for certain, so no id changes:

    's|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+

A match has white space at its start or is nothing else, so one always ends between a character that is not white space
and one that is; and the matches with letters in them end where the letters end. Where a million
characters have no such position the row is cut all the same, and the number of such rows is reported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wikift.data.texts import Ends, Texts

LONG_CHARACTERS = 64_000
HOPELESS_CHARACTERS = 1_000_000

# Before white space; or after a letter and before ASCII or CJK punctuation or a digit. Only characters of which every
# version of Unicode says the same are named, since Python's tables and the tokenizer's may differ.
_LETTERS = (
    r"A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u02af"  # Latin
    r"\u0391-\u03a1\u03a3-\u03a9\u03b1-\u03c9\u0410-\u044f\u05d0-\u05ea\u0627-\u063a"  # Greek, Cyrillic, Hebrew, Arabic
    r"\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"  # kana, Han, Hangul
)
_CJK_MARKS = r"\u3001\u3002\uff01\uff0c\uff1f"
_SAFE_PLACE = re.compile(rf"[!-~{_LETTERS}{_CJK_MARKS}](?=[ \t\n\r])|[{_LETTERS}](?=[!-@\[-`{{-~{_CJK_MARKS}])")
_SEARCH_CHARACTERS = 4096


@dataclass
class Cuts:
    """How many rows were encoded in pieces: at places that change no id, and with one that may."""

    exact: int = 0
    inexact: int = 0
    unsplit: tuple[str, ...] | None = None  # added tokens; None: this tokenizer's rows are never cut


def cut_rule(tokenizer_file: Path) -> Cuts:
    """Whether rows may be cut for this tokenizer: only if it splits text as GPT-2's does."""
    content = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    before, added = content.get("pre_tokenizer") or {}, content.get("added_tokens") or []
    alike = (
        content["model"].get("type") == "BPE"
        and content.get("normalizer") is None
        and before.get("type") == "ByteLevel"
        and before.get("use_regex", True)
        and not before.get("add_prefix_space", True)
        and not any(token.get(flag) for token in added for flag in ("lstrip", "rstrip", "single_word"))
    )
    return Cuts(unsplit=tuple(token["content"] for token in added) if alike else None)


def cut_place(text: str, unsplit: tuple[str, ...], low: int, high: int, *, last: bool) -> int:
    """The last (or first) place in `text`, `low < end <= high`, where cutting changes no id; 0 if there is none."""
    high = min(high, len(text) - max(map(len, unsplit), default=1))  # a token begun here could end in what is to come
    starts = range(low, high, _SEARCH_CHARACTERS)
    for start in reversed(starts) if last else starts:
        ends = [match.end() for match in _SAFE_PLACE.finditer(text, start, min(start + _SEARCH_CHARACTERS, high) + 1)]
        for end in reversed(ends) if last else ends:
            near = ((token, text[max(0, end - len(token) + 1) : end + len(token) - 1]) for token in unsplit)
            if end <= high and not any(token in around for token, around in near):
                return end
    return 0


def pieces(texts: Iterable[tuple[str, bool]], cuts: Cuts) -> Iterator[tuple[str, bool, bool]]:
    """(text, ends its row) -> (text, ends its row, shares a word with the next), few longer than 64,000 characters.

    Holds the rest of one row. Counts in `cuts` what it does.
    """
    held: list[str] = []
    exact = inexact = False
    for text, ends in texts:
        if ends and not held and len(text) <= LONG_CHARACTERS:
            yield text, True, False
            continue
        held.append(text)
        del text
        if not ends and (cuts.unsplit is None or sum(map(len, held)) <= LONG_CHARACTERS):
            continue
        rest = "".join(held) if len(held) > 1 else held[0]
        held.clear()
        position = 0
        if cuts.unsplit is not None:
            for cut, safe in _places(rest, cuts.unsplit):
                exact, inexact = True, inexact or not safe
                yield rest[position:cut], False, not (rest[cut - 1].isspace() or rest[cut].isspace())
                position = cut
        held.append(rest[position:])
        del rest
        if ends:
            yield held.pop(), True, False
            cuts.exact, cuts.inexact = cuts.exact + (exact and not inexact), cuts.inexact + inexact
            exact = inexact = False


def _places(text: str, unsplit: tuple[str, ...]) -> Iterator[tuple[int, bool]]:
    """Where to cut a long text, in order, and whether that changes no id."""
    position = 0
    while len(text) - position > LONG_CHARACTERS:
        soon, late = position + LONG_CHARACTERS, position + HOPELESS_CHARACTERS
        cut = cut_place(text, unsplit, position, soon, last=True) or cut_place(text, unsplit, soon, late, last=False)
        if not cut and len(text) <= late:
            return
        position = cut or late
        yield position, bool(cut)


def short_rows(batches: Iterable[tuple[Texts, Ends]], cuts: Cuts) -> Iterator[tuple[Texts, Ends, int]]:
    """Batches as they are; from one with a long row or the part of a row in it, up to a row's end, by `pieces`."""
    batches = iter(batches)

    def strings(texts: Texts, ends: Ends) -> Iterator[tuple[str, bool]]:
        yield from zip(texts, ends.tolist(), strict=True)
        while not ends[-1]:
            texts, ends = next(batches)
            yield from zip(texts, ends.tolist(), strict=True)

    for texts, ends in batches:
        if not len(texts):
            continue
        if ends.all() and texts.lengths.max() <= LONG_CHARACTERS:
            yield texts, ends, 0
            continue
        for text, end, shared in pieces(strings(texts, ends), cuts):
            yield Texts.of((text,)), np.array([end]), int(shared)


def training_texts(texts: Iterable[tuple[str, bool]], unsplit: str) -> Iterator[str]:
    """The same text in pieces of bounded length, for a tokenizer of GPT-2's kind to be trained on."""
    return (text for text, _, _ in pieces(texts, Cuts(unsplit=(unsplit,))))
