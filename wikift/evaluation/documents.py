"""A corpus' rows as documents, and as the texts that the evaluation protocols are about. Nothing here is tokenized.

A document is a row where rows are documents; in line-wise text, as WikiText is, it is what lm-evaluation-harness calls
a page: it begins at a line ` = Title = ` (loading script of EleutherAI/wikitext_document_level). A text comes as
(text, ends its unit, document): a unit is what the tokenizer gets at once, a row, a page or everything. Memory is
one text's, as long as the corpus' readers make them (a megabyte of a .txt file's line).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from wikift.data.corpus import Corpus
from wikift.evaluation.detokenize import Part, detokenized_parts

_WHITE = re.compile(r"\s+")


class Row(NamedTuple):
    """A row, or a piece of a long one. `entire`: all of it; `title`: it begins a page."""

    text: str
    ends: bool
    document: int
    entire: bool
    title: bool


@dataclass
class Counts:
    """By document: words and UTF-8 bytes as the protocol counts them, and tokens; and all bytes read."""

    words: list[int] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    bytes_read: int = 0

    def add(self, document: int, word_count: int = 0, byte_count: int = 0, token_count: int = 0) -> None:
        """Add to `document`; those before it get zeros where nothing was added to them."""
        columns = (self.words, self.bytes, self.tokens)
        for counts, number in zip(columns, (word_count, byte_count, token_count), strict=True):
            counts.extend([0] * (document + 1 - len(counts)))
            counts[document] += number


def is_title(line: str) -> bool:
    """Whether a line begins a page: ` = Title = `, and not ` = = Section = = `."""
    plain = line.replace("= = =", "===").replace("= =", "==").strip()
    return plain.startswith("= ") and plain.endswith(" =")


def numbered_rows(corpus: Corpus, split: str) -> Iterator[Row]:
    """The rows of `split` with the number of their document; what is blank before the first title belongs to it."""
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
    """Each row a unit. Words are the papers' on WikiText: those between white space, and one end of line per row."""
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
    """Each page a unit, detokenized. Words and bytes are those of the page before that, as lm-evaluation-harness' are:
    `len(re.split(r"\\s+", page))`, and no end of line."""
    return detokenized_parts(_counted_pages(pages(corpus, numbered_rows(corpus, split)), counts))


def joined_pages(corpus: Corpus, split: str, counts: Counts) -> Iterator[Part]:
    """The detokenized pages joined by line ends, one unit. Words are the papers', of the rows before that."""
    document, between = 0, ""
    rows = _counted(numbered_rows(corpus, split), counts)
    for text, ends, document in detokenized_parts(pages(corpus, rows)):
        yield between + text, False, document
        between = "\n" if ends else ""
    yield "", True, document


def pages(corpus: Corpus, rows: Iterable[Row]) -> Iterator[Part]:
    """The pages in their original form, each without the line end before the next title; what is blank is omitted,
    save on the last page.

    The Hub's rows are WikiText's lines, but of a blank line, which is " \\n" in the files, an empty row is left.
    """
    held: list[str] = []  # of the page: all of it until something is to be seen, then the last text
    document, visible = 0, False
    for row in rows:
        if row.title:
            if visible and held:
                yield held[-1] if corpus.rows_are_documents else held[-1].removesuffix("\n"), True, document
            held, visible = [], False
        document, text = row.document, row.text
        visible = visible or bool(text.strip())
        if not corpus.rows_are_documents and not corpus.rows_are_lines and not text.endswith("\n"):
            text += "\n" if text else " \n"
        if visible:
            yield from ((text, False, document) for text in held)
            held = []
        held.append(text)
    if held:
        yield "".join(held), True, document


def _counted(rows: Iterable[Row], counts: Counts) -> Iterator[Row]:
    joined = False  # the text before this one ended inside a word of the same row
    for row in rows:
        text, size = row.text, len(row.text.encode())
        word_count = len(text.split()) - (joined and bool(text) and not text[0].isspace()) + row.ends
        joined = not row.ends and (not text[-1].isspace() if text else joined)
        counts.bytes_read += size
        counts.add(row.document, word_count, size)
        yield row


def _counted_pages(parts: Iterable[Part], counts: Counts) -> Iterator[Part]:
    begins, white = True, False  # this text begins a page; the one before it ended in white space
    for text, ends, document in parts:
        runs = len(_WHITE.findall(text)) - (white and bool(text) and text[0].isspace())
        white = not ends and (text[-1].isspace() if text else white)
        counts.bytes_read += len(text.encode())
        counts.add(document, runs + begins, len(text.encode()))
        begins = ends
        yield text, ends, document
