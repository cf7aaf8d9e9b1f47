"""A corpus' rows as documents, and as the texts that the evaluation protocols are about. Nothing here is tokenized.

A document is a row where rows are documents; in line-wise text, as WikiText is, it is what lm-evaluation-harness calls
a page: it begins at a line ` = Title = ` (loading script of EleutherAI/wikitext_document_level). A text comes as
(text, ends its unit, document): a unit is what the tokenizer is given at once, a row, a page or everything. Memory is
one text's, as long as the corpus' readers give them (a megabyte of a .txt file's line).
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
    """A row, or a piece of a long one. `whole`: all of it; `title`: it begins a page."""

    text: str
    ends: bool
    document: int
    whole: bool
    title: bool


@dataclass
class Counts:
    """What has been read, by document: words and UTF-8 bytes, as the protocol counts them; and all bytes read."""

    words: list[int] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    bytes_read: int = 0

    def add(self, document: int, words: int, size: int) -> None:
        """Add to `document`, the last one or the next."""
        if document == len(self.words):
            self.words.append(0)
            self.bytes.append(0)
        self.words[document] += words
        self.bytes[document] += size


def is_title(line: str) -> bool:
    """Whether a line begins a page: ` = Title = `, and not ` = = Section = = `."""
    plain = line.replace("= = =", "===").replace("= =", "==").strip()
    return plain.startswith("= ") and plain.endswith(" =")


def numbered_rows(corpus: Corpus, split: str) -> Iterator[Row]:
    """The rows of `split` with the number of their document; what is blank before the first title belongs to it."""
    document, visible, between = 0, False, True
    for text, ends in corpus.texts(split):
        whole = between and ends
        title = between and (corpus.rows_are_documents or (whole and is_title(text)))
        if title and visible:
            document, visible = document + 1, False
        visible = visible or bool(text.strip())
        yield Row(text, ends, document, whole, title)
        between = ends


def row_texts(corpus: Corpus, split: str, counts: Counts) -> Iterator[Part]:
    """Each row a unit. Words are the papers' on WikiText: those between white space, and one end of line per row."""
    for row in _counted(numbered_rows(corpus, split), counts):
        yield row.text, row.ends, row.document


def joined_rows(corpus: Corpus, split: str, counts: Counts) -> Iterator[Part]:
    """The rows joined as `"\\n\\n".join(rows)`, one unit; a blank line is an empty row, as on the Hub."""
    document, between = 0, ""
    for row in _counted(numbered_rows(corpus, split), counts):
        blank = row.whole and not corpus.rows_are_documents and not row.text.strip()
        document = row.document
        yield between + ("" if blank else row.text), False, document
        between = "\n\n" if row.ends else ""
    yield "", True, document


def page_texts(corpus: Corpus, split: str, counts: Counts) -> Iterator[Part]:
    """Each page a unit, detokenized. Words and bytes are those of the page before that, as lm-evaluation-harness' are:
    `len(re.split(r"\\s+", page))`, and no end of line."""
    yield from detokenized_parts(_counted_pages(pages(corpus, split), counts))


def joined_pages(corpus: Corpus, split: str, counts: Counts) -> Iterator[Part]:
    """The detokenized pages joined by line ends, one unit. Words are the papers', of the text before that."""
    for _ in _counted(numbered_rows(corpus, split), counts):
        pass  # pages don't say where rows end: the words are counted in a reading of their own
    read, counts.bytes_read = counts.bytes_read, 0
    document, between = 0, ""
    for text, ends, document in detokenized_parts(_read(pages(corpus, split), counts)):
        yield between + text, False, document
        between = "\n" if ends else ""
    counts.bytes_read = read
    yield "", True, document


def pages(corpus: Corpus, split: str) -> Iterator[Part]:
    """The pages in their original form, each without the line end before the next title; what is blank is left out,
    save on the last page.

    The Hub's rows are WikiText's lines, but of a blank line, which is " \\n" in the files, an empty row is left.
    """
    held: list[str] = []  # of the page: all of it until something is to be seen, then the last text
    document, visible = 0, False
    for row in numbered_rows(corpus, split):
        if row.title:
            if visible and held:
                last = held[-1] if corpus.rows_are_documents else held[-1].removesuffix("\n")
                yield last, True, document
            held, visible = [], False
        document = row.document
        visible = visible or bool(row.text.strip())
        text = row.text
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
        text = row.text
        words = len(text.split()) - (joined and bool(text) and not text[0].isspace()) + row.ends
        joined = not row.ends and (not text[-1].isspace() if text else joined)
        size = len(text.encode())
        counts.bytes_read += size
        counts.add(row.document, words, size)
        yield row


def _counted_pages(parts: Iterable[Part], counts: Counts) -> Iterator[Part]:
    fresh, white = True, False  # at a page's beginning; the text before this one ended in white space
    for text, ends, document in _read(parts, counts):
        runs = len(_WHITE.findall(text)) - (white and bool(text) and text[0].isspace())
        white = not ends and (text[-1].isspace() if text else white)
        counts.add(document, runs + fresh, len(text.encode()))
        fresh = ends
        yield text, ends, document


def _read(parts: Iterable[Part], counts: Counts) -> Iterator[Part]:
    for text, ends, document in parts:
        counts.bytes_read += len(text.encode())
        yield text, ends, document
