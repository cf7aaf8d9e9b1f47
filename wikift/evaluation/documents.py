"""A corpus' rows as documents, and as the texts that the evaluation protocols are about. Nothing here is tokenized.

A document is a row where rows are documents; in line-wise text, as WikiText is, it is what lm-evaluation-harness calls
a page: it begins at a line ` = Title = ` (loading script of EleutherAI/wikitext_document_level). Memory is a page's.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from wikift.data.corpus import Corpus
from wikift.evaluation.detokenize import detokenized


class Part(NamedTuple):
    """Text of one `document`. A unit is what the tokenizer gets at once (a row, a page or everything): `ends` it?"""

    text: str
    ends: bool
    document: int


class Row(NamedTuple):
    """A row of a corpus. `title`: a document begins with it."""

    text: str
    document: int
    title: bool


@dataclass
class Counts:
    """By document: words and UTF-8 bytes as the protocol counts them, and tokens."""

    words: Counter[int] = field(default_factory=Counter)
    bytes: Counter[int] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)


def is_title(line: str) -> bool:
    """Whether a line begins a page: ` = Title = `, and not ` = = Section = = `."""
    plain = line.replace("= = =", "===").replace("= =", "==").strip()
    return plain.startswith("= ") and plain.endswith(" =")


def numbered_rows(corpus: Corpus, split: str) -> Iterator[Row]:
    """The rows of `split`; what is blank before the first title belongs to its document."""
    document, visible = 0, False
    for text in corpus.texts(split):
        title = corpus.rows_are_documents or is_title(text)
        if title and visible:
            document, visible = document + 1, False
        visible = visible or bool(text.strip())
        yield Row(text, document, title)


def row_texts(corpus: Corpus, split: str, counts: Counts) -> Iterator[Part]:
    """Each row a unit. Words are the papers' on WikiText: those between white space, and one end of line per row."""
    for row in _counted(numbered_rows(corpus, split), counts):
        yield Part(row.text, True, row.document)


def joined_rows(corpus: Corpus, split: str, counts: Counts) -> Iterator[Part]:
    """The rows joined as `"\\n\\n".join(rows)`, one unit; a blank line is an empty row, as on the Hub."""
    document, separator = 0, ""
    for text, document, _ in _counted(numbered_rows(corpus, split), counts):
        blank = not corpus.rows_are_documents and not text.strip()
        yield Part(separator + ("" if blank else text), False, document)
        separator = "\n\n"
    yield Part("", True, document)


def page_texts(corpus: Corpus, split: str, counts: Counts) -> Iterator[Part]:
    """Each page a unit, detokenized. Words and bytes are those of the page before that, as lm-evaluation-harness' are,
    and no end of line."""
    for page, document in pages(corpus, numbered_rows(corpus, split)):
        counts.words[document] += len(re.split(r"\s+", page))
        counts.bytes[document] += len(page.encode())
        yield Part(detokenized(page), True, document)


def joined_pages(corpus: Corpus, split: str, counts: Counts) -> Iterator[Part]:
    """The detokenized pages joined by line ends, one unit. Words are the papers', of the rows before that."""
    document, separator = 0, ""
    for page, document in pages(corpus, _counted(numbered_rows(corpus, split), counts)):
        yield Part(separator + detokenized(page), False, document)
        separator = "\n"
    yield Part("", True, document)


def pages(corpus: Corpus, rows: Iterable[Row]) -> Iterator[tuple[str, int]]:
    """The pages in their original form with their numbers, each without the line end before the next title. Blank text
    before the first title is omitted.

    The Hub's rows are WikiText's lines, but of a blank line, which is " \\n" in the files, an empty row is left.
    """
    held, document, visible = list[str](), 0, False
    for row in rows:
        if row.title:
            if visible:
                page = "".join(held)
                yield (page if corpus.rows_are_documents else page.removesuffix("\n")), document
            held, visible = [], False
        held.append(row.text)
        document, visible = row.document, visible or bool(row.text.strip())
        if not corpus.rows_are_documents and not row.text.endswith("\n"):
            held.append("\n" if row.text else " \n")
    yield "".join(held), document


def _counted(rows: Iterable[Row], counts: Counts) -> Iterator[Row]:
    for row in rows:
        counts.words[row.document] += len(row.text.split()) + 1
        counts.bytes[row.document] += len(row.text.encode())
        yield row
