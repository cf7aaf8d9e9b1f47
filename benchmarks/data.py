"""Text to tokens: run_clm's datasets.map, nanoGPT's prepare, wikift; then opening a store and reading blocks of it.

    python -m benchmarks.data [--megabytes 540] [--peers-megabytes 16] [--rounds 3] [--folder KEPT] [--tokenizer FOLDER]

Each contestant is a command in a process of its own, from parquet files to what its training reads: run_clm's two
`map`s (tokenize, group into blocks of 1,024) into Arrow files, nanoGPT's `map` and memory-mapped uint16, wikift's
store. A contestant runs on 1 MB and on its corpus, both from `benchmarks.corpus`; the first is its start-up, and its
rate is the difference of the bytes over the difference of the times. wikift gets all the megabytes, the others, for
time, a sample of the same make; they have as many processes as the machine has cores, wikift as many workers.
nanoGPT's file and wikift's store of the sample are compared byte for byte: both end each row with end-of-text.
The tokenizer is GPT-2's where the test data is there (WIKIFT_TEST_DATA), else one trained on the sample.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks import corpus, harness

SMALL_MEGABYTES = 1.0
BLOCK = 1024


# --- the peers, each in its own process --------------------------------------------------------------------------


def run_clm(source: Path, out: Path, tokenizer: Path, cores: int) -> None:
    """As transformers' examples/pytorch/language-modeling/run_clm.py prepares its data."""
    import datasets
    from transformers import AutoTokenizer

    encode = AutoTokenizer.from_pretrained(tokenizer)
    raw = _loaded(source, out)

    def group(examples: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = {key: [i for ids in lists for i in ids] for key, lists in examples.items()}
        total = len(joined["input_ids"]) // BLOCK * BLOCK
        result = {key: [ids[i : i + BLOCK] for i in range(0, total, BLOCK)] for key, ids in joined.items()}
        result["labels"] = result["input_ids"].copy()
        return result

    def tokenize(examples: dict[str, list[str]]) -> object:
        return encode(examples["text"])

    assert isinstance(raw, datasets.DatasetDict)
    tokenized = raw.map(tokenize, batched=True, num_proc=cores, remove_columns=["text"])
    tokenized.map(group, batched=True, num_proc=cores)


def nanogpt(source: Path, out: Path, tokenizer: Path, cores: int) -> None:
    """As nanoGPT's data/openwebtext/prepare.py, with the vocabulary read from `tokenizer`."""
    encoding = _tiktoken(tokenizer)

    def process(example: dict[str, str]) -> dict[str, object]:
        ids = encoding.encode_ordinary(example["text"])
        ids.append(encoding.eot_token)
        return {"ids": ids, "len": len(ids)}

    for split, part in _loaded(source, out).map(process, remove_columns=["text"], num_proc=cores).items():
        total = np.sum(part["len"], dtype=np.uint64)
        file = np.memmap(out / f"{split}.bin", dtype=np.uint16, mode="w+", shape=(int(total),))
        at, batches = 0, min(1024, len(part))
        for number in range(batches):
            batch = part.shard(num_shards=batches, index=number, contiguous=True).with_format("numpy")
            ids = np.concatenate(batch["ids"])
            file[at : at + len(ids)] = ids
            at += len(ids)
        file.flush()


def _loaded(source: Path, out: Path):  # type: ignore[no-untyped-def]
    import datasets

    files = {split: [str(p) for p in sorted(source.glob(f"{split}-*"))] for split in ("train", "validation", "test")}
    return datasets.load_dataset("parquet", data_files=files, cache_dir=str(out / "cache"))


def _tiktoken(tokenizer: Path):  # type: ignore[no-untyped-def]
    """GPT-2's encoding, or another of its kind, out of the vocabulary, whose ids are the merges' ranks."""
    import tiktoken
    from transformers import AutoTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    vocabulary = dict(AutoTokenizer.from_pretrained(tokenizer).get_vocab())
    end = vocabulary.pop("<|endoftext|>")
    return tiktoken.Encoding(
        "gpt2",
        pat_str=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
        mergeable_ranks={bytes(byte_of[c] for c in token): rank for token, rank in vocabulary.items()},
        special_tokens={"<|endoftext|>": end},
    )


# --- the contest -------------------------------------------------------------------------------------------------


def command(name: str, source: Path, out: Path, tokenizer: Path) -> list[str]:
    if name == "wikift":
        words = ["launch/prepare.py", "--dataset", str(source), "--tokenizer", str(tokenizer), "--out", str(out)]
        return [sys.executable, *words, "--quiet"]
    return [sys.executable, "-m", "benchmarks.data", "--peer", name, str(source), str(out), str(tokenizer)]


def contestant(name: str, small: Path, large: Path, work: Path, tokenizer: Path) -> Mapping[str, float]:
    """Figures of one run on `small` and one on `large`."""
    seconds, memory = [], 0.0
    for source in (small, large):
        out = work / f"{name}-{source.name}"
        shutil.rmtree(out, ignore_errors=True)
        spent, memory = harness.timed(command(name, source, out, tokenizer))
        seconds.append(spent)
    megabytes = size(large) - size(small)
    if seconds[1] <= seconds[0]:
        raise SystemExit(
            f"{name}: {seconds[1]:.1f} s for all, {seconds[0]:.1f} s for 1 MB: noise; give it more megabytes"
        )
    return {"MB/s": megabytes / (seconds[1] - seconds[0]), "start-up s": seconds[0], "memory MB": memory}


def size(source: Path) -> float:
    """Megabytes of text in all splits."""
    from wikift.data.sources import Source, open_source

    if source not in _SIZES:
        splits = open_source(Source(str(source)), cut=False).splits
        _SIZES[source] = sum(len(batch.data) for rows in splits.values() for batch in rows()) / 1e6
    return _SIZES[source]


_SIZES: dict[Path, float] = {}


def reading(store: Path) -> Mapping[str, float]:
    """Opening the store in a process that has imported what it needs, and random blocks on a warm page cache."""
    from wikift.data.batches import BatchLayout, count_blocks, micro_batches, sample_blocks
    from wikift.data.store import open_store

    start = time.perf_counter()
    opened = open_store(store)
    seconds = time.perf_counter() - start
    tokens = opened.tokens("train")
    int(tokens.max())  # every page is in memory now
    items = sample_blocks(count_blocks(len(tokens), BLOCK), 1.0, 1)
    stream = micro_batches(tokens, items, BatchLayout(BLOCK, 64), run_seed=1)
    next(stream)
    start, steps = time.perf_counter(), 200
    for _ in range(steps):
        next(stream)
    rate = steps * 64 * (BLOCK + 1) / (time.perf_counter() - start)
    return {"open ms": seconds * 1e3, "Mtokens/s": rate / 1e6, "GB/s": rate * 2 / 1e9}


def main() -> None:
    """Run the contest, or one peer of it."""
    parser = harness.options(__doc__, "data", rounds=3)
    parser.add_argument("--tokenizer", type=Path, help="a folder")
    parser.add_argument("--megabytes", type=float, default=540, help="wikift's")
    parser.add_argument("--peers-megabytes", type=float, default=16)
    parser.add_argument("--folder", type=Path, help="where the corpora are kept between runs; default a temporary one")
    parser.add_argument("--peer", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peer:
        name, source, out, tokenizer = given.peer
        Path(out).mkdir(parents=True)
        {"run_clm": run_clm, "nanogpt": nanogpt}[name](Path(source), Path(out), Path(tokenizer), harness.cores())
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        kept = (given.folder or work).resolve()
        sizes = {
            "small": SMALL_MEGABYTES, f"sample-{given.peers_megabytes:g}": given.peers_megabytes,
            f"full-{given.megabytes:g}": given.megabytes,
        }  # fmt: skip
        for seed, (name, megabytes) in enumerate(sizes.items(), 1):
            if not (kept / name / "test-00000-of-00001.parquet").exists():
                print(corpus.write(kept / name, megabytes, seed), file=sys.stderr)
        small, sample, full = (kept / name for name in sizes)
        tokenizer = given.tokenizer.resolve() if given.tokenizer else usual_tokenizer(sample, work)
        large = {"run_clm": sample, "nanogpt": sample, "wikift": full}
        figures = harness.interleave(
            {name: partial(contestant, name, small, large[name], work, tokenizer) for name in large}, given.rounds
        )
        harness.timed(command("wikift", sample, work / "wikift-sample", tokenizer))
        ours = (work / "wikift-sample/train.bin").read_bytes()
        same = ours == (work / f"nanogpt-{sample.name}/train.bin").read_bytes()
        blocks = harness.interleave({"wikift's store": partial(reading, work / f"wikift-{full.name}")}, given.rounds)
    name, _ = corpus.source_rows()
    harness.write(
        given.name,
        "Text to tokens",
        [
            *harness.table(figures, against="run_clm", figure="MB/s"),
            "",
            "MB/s after start-up, parquet files to what training reads; memory is the largest process's.",
            f"wikift's store and nanoGPT's file of the sample are {'equal' if same else 'NOT equal'}, byte for byte.",
            "",
            f"The store of {given.megabytes:g} MB, warm page cache, one thread, 64 random blocks of {BLOCK} a time:",
            "",
            *harness.table(blocks, against="wikift's store", figure="Mtokens/s"),
        ],
        {**figures, **blocks},
        settings={
            "wikift's MB": given.megabytes, "peers' MB": given.peers_megabytes, "corpus": f"learned from the {name}"
        },
        about=harness.machine("wikift", "gigatoken", "tokenizers", "tiktoken", "datasets", "transformers", "pyarrow"),
        folder=given.results,
        against=dict.fromkeys(figures, "run_clm"),
    )  # fmt: skip


def usual_tokenizer(sample: Path, work: Path) -> Path:
    from tests.real import GPT2_TOKENIZER

    if GPT2_TOKENIZER.is_dir():
        return GPT2_TOKENIZER.resolve()
    words = ["--dataset", str(sample), "--tokenizer", "train:8192", "--out", str(work / "trained"), "--quiet"]
    harness.timed([sys.executable, "launch/prepare.py", *words])
    return work / "trained" / "tokenizer"


if __name__ == "__main__":
    main()
