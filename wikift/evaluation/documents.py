"""A corpus' rows as documents, and as the texts that the evaluation protocols are about. Nothing here is tokenized.

A document is a row where rows are documents; in line-wise text, as WikiText is, it is what lm-evaluation-harness calls
a page: it begins at a line ` = Title = ` (loading script of EleutherAI/wikitext_document_level). Memory is a row's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from wikift.data.corpus import Corpus
from wikift.evaluation.detokenize import Part, detokenized_parts


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
    """Each page a unit, detokenized. Words and bytes are those of the page before that, as lm-evaluation-harness' are:
    `len(re.split(r"\\s+", page))`, and no end of line."""
    return detokenized_parts(_counted_pages(pages(corpus, numbered_rows(corpus, split)), counts))


def joined_pages(corpus: Corpus, split: str, counts: Counts) -> Iterator[Part]:
    """The detokenized pages joined by line ends, one unit. Words are the papers', of the rows before that."""
    document, separator = 0, ""
    rows = _counted(numbered_rows(corpus, split), counts)
    for text, ends, document in detokenized_parts(pages(corpus, rows)):
        yield Part(separator + text, False, document)
        separator = "\n" if ends else ""
    yield Part("", True, document)


def pages(corpus: Corpus, rows: Iterable[Row]) -> Iterator[Part]:
    """The pages in their original form, each without the line end before the next title. Blank text before the first
    title is omitted.

    The Hub's rows are WikiText's lines, but of a blank line, which is " \\n" in the files, an empty row is left.
    """
    text, document, visible = "", 0, False  # the page's last row, or all of it as long as it is blank
    for row in rows:
        if visible:
            last = text if corpus.rows_are_documents or not row.title else text.removesuffix("\n")
            yield Part(last, row.title, document)
        if visible or row.title:
            text, visible = "", visible and not row.title
        text, document, visible = text + row.text, row.document, visible or bool(row.text.strip())
        if not corpus.rows_are_documents and not row.text.endswith("\n"):
            text += "\n" if row.text else " \n"
    yield Part(text, True, document)


def _counted(rows: Iterable[Row], counts: Counts) -> Iterator[Row]:
    for row in rows:
        counts.words[row.document] += len(row.text.split()) + 1
        counts.bytes[row.document] += len(row.text.encode())
        yield row


def _counted_pages(parts: Iterable[Part], counts: Counts) -> Iterator[Part]:
    begins, blank_end = True, False  # of a page; what is before this part ended in white space
    for text, ends, document in parts:
        blank_end = text[-1].isspace() if text else blank_end
        # re.split's empty strings at the page's two ends
        counts.words[document] += len(text.split()) + (begins and text[:1].isspace()) + (ends and blank_end)
        counts.bytes[document] += len(text.encode())
        begins = ends
        yield Part(text, ends, document)
