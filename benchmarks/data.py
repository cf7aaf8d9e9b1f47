"""Text to tokens: run_clm's datasets.map and wikift.

    python -m benchmarks.data [--megabytes 540] [--peer-megabytes 16] [--rounds 3] [--folder KEPT]

Each contestant is a command in a process of its own, from a Parquet file to what its training reads: run_clm's two
`map`s (benchmarks/clm.py) into Arrow files, wikift's store. It runs on 1 MB, which is its start-up, and on its corpus;
its rate is the difference of the bytes over the difference of the times. wikift gets all the megabytes, run_clm, for
time, a sample of the same make; both have as many processes as there are cores. Memory is the largest process's. The
tokenizer is GPT-2's where the test data is (WIKIFT_TEST_DATA), else one trained on 1 MB.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import harness

WRITERS, STEPS = 16_384, 96  # each writes so many words at a time
TAIL_WORDS = 600_000


def source_rows() -> tuple[str, list[str]]:
    """Which text a corpus is learned from, and its rows: the WikiText mirror's, or pydoc's topics."""
    from pydoc_data.topics import topics

    from tests.real import WIKITEXT_MIRROR

    files = sorted((WIKITEXT_MIRROR / "wikitext-103-v1").glob("train-*.parquet"))
    if files:
        rows = [row for file in files for row in pq.read_table(file)["text"].to_pylist()]
        return "the WikiText mirror", [row for row in rows if row.strip()]
    return "pydoc's topics", [line for text in topics.values() for line in text.split("\n")]


def write_corpus(file: Path, megabytes: float, seed: int = 1) -> Path:
    """A Parquet file of real words in real order with a long tail, and nothing repeated as a block.

    Many writers walk over the source as a Markov chain: from a word to the successor of one of its occurrences, drawn
    at random. Such a walk lacks the tail, by whose absence caches in tokenizers are flattered: words that the source
    has only once are replaced, three times out of four, by others that join the halves of two words, drawn with Zipf's
    law from TAIL_WORDS of them.
    """
    random = np.random.default_rng(seed)
    kinds, stream = np.unique([w for row in source_rows()[1] for w in [*row.split(), "\n"]], return_inverse=True)
    counts, order = np.bincount(stream), np.argsort(stream, kind="stable")  # order: each word's occurrences
    first = np.cumsum(counts) - counts
    halves = zip(random.choice(kinds, TAIL_WORDS), random.choice(kinds, TAIL_WORDS), strict=True)
    tail = [(one[: len(one) // 2 + 1] + other[len(other) // 2 :]).strip() for one, other in halves]
    lexicon = np.array([*kinds, *tail], object)
    at = random.integers(len(stream), size=WRITERS)
    file.parent.mkdir(parents=True, exist_ok=True)
    left = megabytes * 1e6
    with pq.ParquetWriter(file, pa.schema([("text", pa.string())])) as out:
        while left > 0:
            columns = []
            for _ in range(STEPS):
                word = stream[at]
                at = (order[first[word] + random.integers(counts[word])] + 1) % len(stream)
                rare = (counts[stream[at]] == 1) & (random.random(WRITERS) < 0.75)
                rank = np.exp(random.random(WRITERS) * np.log(TAIL_WORDS)).astype(np.int64) - 1  # Zipf
                columns.append(np.where(rare, len(kinds) + rank, stream[at]))
            text = " ".join(lexicon[np.stack(columns, axis=1).ravel()])  # a writer's words are neighbours
            text = text[: int(left)]  # more bytes than letters by some
            left -= len(text.encode())
            out.write_table(pa.table({"text": text.split("\n")}), row_group_size=8192)
    return file


def usual_tokenizer() -> str:
    from tests.real import GPT2_TOKENIZER

    return str(GPT2_TOKENIZER.resolve()) if GPT2_TOKENIZER.is_dir() else "train:8192"


def prepare(source: Path, out: Path, tokenizer: str) -> list[str]:
    """The command of wikift's."""
    words = ["--dataset", str(source), "--tokenizer", tokenizer, "--out", str(out), "--quiet"]
    return [sys.executable, "launch/prepare.py", *words]


def run_clm(source: Path, out: Path, tokenizer: str) -> list[str]:
    """The command of run_clm's."""
    words = ["--model_name_or_path", tokenizer, "--train_file", str(source), "--output_dir", str(out)]
    return [sys.executable, "benchmarks/clm.py", *words, "--preprocessing_num_workers", str(harness.cores())]


def contestant(name: str, sources: tuple[Path, Path], work: Path, tokenizer: str) -> Mapping[str, float]:
    """Figures of one run on the small source and one on the large."""
    command, seconds, memory = {"wikift": prepare, "run_clm": run_clm}[name], [], 0.0
    for source in sources:
        out = work / f"{name}-{source.stem}"
        shutil.rmtree(out, ignore_errors=True)
        spent, memory = harness.timed(command(source, out, tokenizer), HF_DATASETS_CACHE=str(out / "cache"))
        seconds.append(spent)
    small, large = (sum(len(row.encode()) for row in pq.read_table(s)["text"].to_pylist()) / 1e6 for s in sources)
    return {"MB/s": (large - small) / (seconds[1] - seconds[0]), "start-up s": seconds[0], "memory MB": memory}


def main() -> None:
    """Run the contest."""
    parser = harness.options(__doc__, "data", rounds=3)
    parser.add_argument("--megabytes", type=float, default=540, help="wikift's")
    parser.add_argument("--peer-megabytes", type=float, default=16)
    parser.add_argument("--folder", type=Path, help="where the corpora are kept between runs; default a temporary one")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        files = []
        for seed, megabytes in enumerate((1, given.peer_megabytes, given.megabytes), 1):
            files.append((given.folder or work).resolve() / f"{megabytes:g}.parquet")
            if not files[-1].exists():
                write_corpus(files[-1], megabytes, seed)
        small, sample, full = files
        harness.timed(prepare(small, work / "first", usual_tokenizer()))
        tokenizer = str(work / "first" / "tokenizer")
        contestants = {
            "run_clm": partial(contestant, "run_clm", (small, sample), work, tokenizer),
            "wikift": partial(contestant, "wikift", (small, full), work, tokenizer),
        }
        figures = harness.interleave(contestants, given.rounds)
    about = harness.machine("wikift", "gigatoken", "tokenizers", "datasets", "transformers", "pyarrow")
    settings = {"wikift's MB": given.megabytes, "run_clm's MB": given.peer_megabytes, "learned from": source_rows()[0]}
    lines = harness.table(figures, "run_clm", "MB/s")
    harness.write(given, "Text to tokens", figures, lines, about=about, **settings)


if __name__ == "__main__":
    main()
