"""A corpus of WikiText-103's size (540 MB, 1.7M rows) out of a seed: real words in real order, with a real long tail.

    python -m benchmarks.corpus FOLDER [--megabytes 540]     # train-0000i.parquet, validation.parquet, test.parquet

The words and their order are learned from a text at hand: the WikiText mirror's train rows where the test data is
there (1M words), else the topics of pydoc, which every Python carries (70,000 words). 16,384 writers at once walk over
that text as a Markov chain: from each word to the successor of one of its occurrences, drawn at random. So frequent
words, headings, punctuation and lengths of rows are as in the text. What such a walk lacks is the tail, by which caches
in tokenizers are flattered: the words that the text has once only are replaced, three times out of four, by words that
a chain over triples of letters invents from the text's own words, drawn with Zipf's law from `TAIL_WORDS` of them; and
every digit is drawn anew. Lines are joined to paragraphs as WikiText has them; nothing is repeated as a block.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

TAIL_WORDS = 600_000
WRITERS = 16_384
STEPS = 96  # words of each writer at a time
ROW_END = "\n"


def source_rows() -> tuple[str, list[str]]:
    """Which text was learned from, and its rows."""
    from tests.real import WIKITEXT_MIRROR

    files = sorted((WIKITEXT_MIRROR / "wikitext-103-v1").glob("train-*.parquet"))
    if files:
        return "wikitext mirror", [row for file in files for row in pq.read_table(file)["text"].to_pylist()]
    from pydoc_data.topics import topics

    return "pydoc topics", [line for name in sorted(topics) for line in topics[name].split("\n")]


def _as_articles(rows: list[str]) -> list[str]:
    """Rows as WikiText has them: a heading between blank rows, then paragraphs of several hundred characters."""
    found, paragraph, headings = [], "", 0
    for row in rows:
        text = row.strip()
        heading = text.startswith("= ") and text.endswith(" =")
        headings += heading
        if heading and headings % 4:
            continue
        if heading or len(paragraph) > 600:
            found += [paragraph] if paragraph else []
            paragraph = ""
        if heading:
            found += ["", text, ""]
        elif text:
            paragraph = f"{paragraph} {text}"
    return [*found, paragraph]


class Writer:
    """Gives endless rows; everything comes from `seed` and the source."""

    def __init__(self, rows: list[str], seed: int) -> None:
        self.random = np.random.default_rng(seed)
        words = [word for row in _as_articles(rows) for word in [*row.split(), ROW_END]]
        counts = Counter(words)
        known = sorted(counts, key=lambda word: (-counts[word], word))
        number = {word: i for i, word in enumerate(known)}
        self.stream = np.fromiter((number[word] for word in words), np.int32, len(words))
        self.places = np.argsort(self.stream, kind="stable").astype(np.int32)  # of each word, in order of words
        self.counts = np.fromiter((counts[word] for word in known), np.int64, len(known))
        self.first = np.concatenate(([0], np.cumsum(self.counts)[:-1]))
        self.row_end = number[ROW_END]
        self.rare = self.counts[self.stream] == 1
        self.at = self.random.integers(0, len(self.stream), WRITERS).astype(np.int32)
        self.tail_start = len(known)
        texts = [" \n" if word == ROW_END else f" {word}" for word in known]
        self.lexicon = pa.array([*texts, *(f" {word}" for word in self.invent(known, TAIL_WORDS))], pa.large_string())

    def invent(self, known: list[str], count: int) -> list[str]:
        """Words of a Markov chain over triples of the letters of `known`, with repetitions as they come."""
        letters = np.frombuffer("".join(f"\0\0{w}\0" for w in known if w.isalpha()).encode("utf-32-le"), np.int32)
        pairs = letters[:-2].astype(np.int64) << 32 | letters[1:-1]
        order = np.argsort(pairs, kind="stable")
        kinds, starts, sizes = np.unique(pairs[order], return_index=True, return_counts=True)
        after = letters[2:][order]
        first = np.zeros(count, np.int64)
        second = np.zeros(count, np.int64)
        columns = []
        for _ in range(14):
            kind = np.searchsorted(kinds, first << 32 | second)
            drawn = after[starts[kind] + (self.random.random(count) * sizes[kind]).astype(np.int64)].astype(np.int64)
            drawn[(second == 0) & (first == 0) & (len(columns) > 0)] = 0
            columns.append(drawn)
            done = (drawn == 0) & (len(columns) > 0)
            first, second = np.where(done, 0, second), drawn
        text = np.stack(columns, 1).astype("<u4").tobytes().decode("utf-32-le")
        return [text[i * 14 : i * 14 + 14].split("\0", 1)[0] or "a" for i in range(count)]

    def batch(self) -> pa.LargeStringArray:
        """The rows of a turn of all writers, about 9 MB."""
        found = np.empty((STEPS, WRITERS), np.int32)
        for step in range(STEPS):
            word = self.stream[self.at]
            drawn = (self.random.random(WRITERS, np.float32) * self.counts[word]).astype(np.int64)
            self.at = self.places[self.first[word] + np.minimum(drawn, self.counts[word] - 1)] + 1
            self.at[self.at == len(self.stream)] = 0
            found[step] = self.stream[self.at]
            rare = np.flatnonzero(self.rare[self.at])
            rare = rare[self.random.random(len(rare)) < 0.75]
            rank = np.exp(self.random.random(len(rare)) * np.log(TAIL_WORDS)).astype(np.int32) - 1  # Zipf
            found[step, rare] = self.tail_start + rank
        ids = found.T.ravel()  # a writer's words are neighbours
        words = self.lexicon.take(pa.array(ids))
        _, offsets, data = words.buffers()
        raw = np.frombuffer(data, np.uint8).copy()
        digits = np.flatnonzero(raw - np.uint8(48) < 10)
        raw[digits] = 48 + self.random.integers(0, 10, len(digits), np.uint8)
        ends = np.frombuffer(offsets, np.int64)[np.flatnonzero(ids == self.row_end) + 1]
        starts = np.concatenate((ends[:-1], ends[-1:]))
        rows = pa.LargeStringArray.from_buffers(len(ends) - 1, pa.py_buffer(starts.copy()), pa.py_buffer(raw))
        blank = pa.compute.equal(rows, " \n")
        return pa.compute.if_else(blank, "", rows)


def write(folder: Path, megabytes: float, seed: int = 1, files: int = 2) -> dict[str, object]:
    """Write train (in `files` parquet files), validation and test of 1.1 MB each; says what was written."""
    name, rows = source_rows()
    writer = Writer(rows, seed)
    folder.mkdir(parents=True, exist_ok=True)
    size = count = 0
    for i, (file, wanted) in enumerate(
        [(f"train-{i:05}-of-{files:05}", megabytes * 1e6 / files) for i in range(files)]
        + [("validation-00000-of-00001", 1.1e6), ("test-00000-of-00001", 1.1e6)]
    ):
        written, schema = 0, pa.schema([("text", pa.string())])
        with pq.ParquetWriter(folder / f"{file}.parquet", schema) as out:
            while written < wanted:
                batch = writer.batch()
                lengths = np.cumsum(pa.compute.binary_length(batch).to_numpy())
                batch = batch[: int(np.searchsorted(lengths, wanted - written)) + 1]
                written += int(pa.compute.sum(pa.compute.binary_length(batch)).as_py())
                out.write_table(pa.table({"text": batch.cast(pa.string())}), row_group_size=8192)
                count += len(batch) if i < files else 0
        size += written if i < files else 0
    return {"corpus": f"seed {seed}, learned from {name}", "train_megabytes": round(size / 1e6, 1), "train_rows": count}


def main() -> None:
    """Write a corpus."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--megabytes", type=float, default=540)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    print(write(given.folder, given.megabytes, given.seed))


if __name__ == "__main__":
    main()
