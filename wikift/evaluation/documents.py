"""A corpus' rows as documents, and as the texts that the evaluation protocols score. Nothing here is tokenized.

A document is a row where rows are documents; in line-wise text, as WikiText is, it is what lm-evaluation-harness calls
a page: it begins at a line ` = Title = ` (loading script of EleutherAI/wikitext_document_level). A text comes as
(text, ends its unit, document): a unit is what is tokenized as one string, a row, a page or everything. Memory is
one text (at most a megabyte of a .txt file's line), or one page where pages are detokenized.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from wikift.data.corpus import Corpus
from wikift.evaluation.detokenize import detokenized

Part = tuple[str, bool, int]

_WHITE = re.compile(r"\s+")


class Row(NamedTuple):
    """A row, or a piece of a long one. `entire`: not a piece; `title`: it begins a page."""

    text: str
    ends: bool
    document: int
    entire: bool
    title: bool


@dataclass
class Counts:
    """By document: words and UTF-8 bytes as the protocol counts them, and tokens."""

    word_counts: list[int] = field(default_factory=list)
    byte_counts: list[int] = field(default_factory=list)
    token_counts: list[int] = field(default_factory=list)

    def add(self, document: int, word_count: int = 0, byte_count: int = 0, token_count: int = 0) -> None:
        """Add to `document`; earlier documents without counts get zeros."""
        columns = (self.word_counts, self.byte_counts, self.token_counts)
        for counts, number in zip(columns, (word_count, byte_count, token_count), strict=True):
            counts.extend([0] * (document + 1 - len(counts)))
            counts[document] += number


def is_title(line: str) -> bool:
    """Whether a line begins a page: ` = Title = `, and not ` = = Section = = `."""
    plain = line.replace("= = =", "===").replace("= =", "==").strip()
    return plain.startswith("= ") and plain.endswith(" =")


def numbered_rows(corpus: Corpus, split: str) -> Iterator[Row]:
    """The rows of `split` with the number of their document; blank ones before the first title are its own."""
    document, visible, between = 0, False, True
    for text, ends in corpus.texts(split):
        entire = between and ends
        title = between and (corpus.rows_are_documents or (entire and is_title(text)))
        if title and visible:
            document, visible = document + 1, False
        visible = visible or bool(text.strip())
        yield Row(text, ends, document, entire, title)
        between = ends


def row_texts(corpus: Corpus, split: str, counts: Counts) -> Iterator[Part]:
    """Each row a unit. Words are the papers' on WikiText: separated by white space, and one end of line per row."""
    for row in _counted(numbered_rows(corpus, split), counts):
        yield row.text, row.ends, row.document


def joined_rows(corpus: Corpus, split: str, counts: Counts) -> Iterator[Part]:
    """The rows joined as `"\\n\\n".join(rows)`, one unit; a blank line is an empty row, as on the Hub."""
    document, between = 0, ""
    for row in _counted(numbered_rows(corpus, split), counts):
        blank = row.entire and not corpus.rows_are_documents and not row.text.strip()
        document = row.document
        yield between + ("" if blank else row.text), False, document
        between = "\n\n" if row.ends else ""
    yield "", True, document


def page_texts(corpus: Corpus, split: str, counts: Counts) -> Iterator[Part]:
    """Each page a unit, detokenized. Words and bytes are the original page's, as lm-evaluation-harness' are:
    `len(re.split(r"\\s+", page))`, and no end of line."""
    for page, document in pages(corpus, numbered_rows(corpus, split)):
        counts.add(document, len(_WHITE.split(page)), len(page.encode()))
        yield detokenized(page), True, document


def joined_pages(corpus: Corpus, split: str, counts: Counts) -> Iterator[Part]:
    """The detokenized pages joined by line ends, one unit. Words are the papers', of the original rows."""
    document, between = 0, ""
    for page, document in pages(corpus, _counted(numbered_rows(corpus, split), counts)):
        yield between + detokenized(page), False, document
        between = "\n"
    yield "", True, document


def pages(corpus: Corpus, rows: Iterable[Row]) -> Iterator[tuple[str, int]]:
    """The pages in their original form and their documents, each without the line end before the next title; blank
    pages are omitted, except the last.

    The Hub's rows are WikiText's lines, except that a blank line, which is " \\n" in the files, is an empty row.
    """
    texts: list[str] = []
    document = 0
    for row in rows:
        if row.title:
            page = "".join(texts)
            if page.strip():
                yield page if corpus.rows_are_documents else page.removesuffix("\n"), document
            texts = []
        document, text = row.document, row.text
        if not corpus.rows_are_documents and not corpus.rows_are_lines and not text.endswith("\n"):
            text += "\n" if text else " \n"
        texts.append(text)
    if texts:
        yield "".join(texts), document


def _counted(rows: Iterable[Row], counts: Counts) -> Iterator[Row]:
    joined = False  # the text before this one ended inside a word of the same row
    for row in rows:
        text = row.text
        word_count = len(text.split()) - (joined and bool(text) and not text[0].isspace()) + row.ends
        joined = not row.ends and (not text[-1].isspace() if text else joined)
        counts.add(row.document, word_count, len(text.encode()))
        yield row
