"""Text to tokens: run_clm's datasets.map, nanoGPT's prepare, wikift; then opening a store and reading blocks of it.

    python -m benchmarks.data [--tokenizer FOLDER] [--megabytes 540] [--rounds 3]

Each contestant is a command in a process of its own, from parquet files to what its training reads: run_clm's two
`map`s (tokenize, group into blocks of 1,024) into Arrow files, nanoGPT's `map` and memory-mapped uint16, wikift's
store. A contestant runs on 1 MB and on its corpus, both from `benchmarks.corpus`; the first is its start-up, and its
rate is the difference of the bytes over the difference of the times. wikift gets all the megabytes, the others, for
time, 16 MB of the same make; they have as many processes as the machine has cores, wikift as many workers.
nanoGPT's file and wikift's store of the 16 MB are compared byte for byte: both end each row with end-of-text.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from benchmarks import corpus, harness

SAMPLE_MEGABYTES, SMALL_MEGABYTES = 16.0, 1.0
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
    """GPT-2's encoding out of vocab.json, whose ids are the merges' ranks."""
    import json

    import tiktoken
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    vocabulary = json.loads((tokenizer / "vocab.json").read_text(encoding="utf-8"))
    end = vocabulary.pop("<|endoftext|>")
    return tiktoken.Encoding(
        "gpt2",
        pat_str=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
        mergeable_ranks={bytes(byte_of[c] for c in token): rank for token, rank in vocabulary.items()},
        special_tokens={"<|endoftext|>": end},
    )


# --- the contest -------------------------------------------------------------------------------------------------


def timed(command: list[str]) -> tuple[float, float]:
    """Seconds, and the largest resident memory of the process or one of its children, in 10^6 bytes."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, cwd=harness.ROOT, stdout=subprocess.DEVNULL, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(f"{' '.join(command)}:\n{errors.read().decode()[-4000:]}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024 / 1e6


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
        spent, memory = timed(command(name, source, out, tokenizer))
        seconds.append(spent)
    megabytes = size(large) - size(small)
    return {"MB/s": megabytes / (seconds[1] - seconds[0]), "start-up s": seconds[0], "memory MB": memory}


def size(source: Path) -> float:
    """Megabytes of text in all splits."""
    from wikift.textfiles import read_parquet

    if source not in _SIZES:
        texts = (texts for file in source.glob("*.parquet") for texts in read_parquet(file, "text"))
        _SIZES[source] = sum(len(batch.data) for batch in texts) / 1e6
    return _SIZES[source]


_SIZES: dict[Path, float] = {}


def reading(store: Path) -> Mapping[str, float]:
    """Opening the store in a process that has imported what it needs, and random blocks on a warm page cache."""
    from wikift.batches import count_blocks, micro_batches, sample_blocks
    from wikift.tokens import open_store

    start = time.perf_counter()
    opened = open_store(store)
    seconds = time.perf_counter() - start
    tokens = opened.tokens("train")
    int(tokens.max())  # every page is in memory now
    items = sample_blocks(count_blocks(len(tokens), BLOCK), 1.0, 1)
    shape = {"block_size": BLOCK, "micro_batch": 64, "accumulation": 1, "rank": 0, "ranks": 1, "run_seed": 1}
    stream = micro_batches(tokens, items, first_step=0, **shape)
    next(stream)
    start, steps = time.perf_counter(), 200
    for _ in range(steps):
        next(stream)
    rate = steps * 64 * (BLOCK + 1) / (time.perf_counter() - start)
    return {"open ms": seconds * 1e3, "Mtokens/s": rate / 1e6, "GB/s of uint16": rate * 2 / 1e9}


def main() -> None:
    """Run the contest, or one peer of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, help="a folder with vocab.json; default the test data's")
    parser.add_argument("--megabytes", type=float, default=540)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the corpora are kept between runs; default a temporary one")
    parser.add_argument("--peer", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    if given.peer:
        name, source, out, tokenizer = given.peer
        Path(out).mkdir(parents=True)
        {"run_clm": run_clm, "nanogpt": nanogpt}[name](Path(source), Path(out), Path(tokenizer), cores)
        return
    from tests.real import GPT2_TOKENIZER

    tokenizer = (given.tokenizer or GPT2_TOKENIZER).resolve()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        kept = (given.folder or work).resolve()
        sizes = {"small": SMALL_MEGABYTES, "sample": SAMPLE_MEGABYTES, f"full-{given.megabytes:g}": given.megabytes}
        for seed, (name, megabytes) in enumerate(sizes.items(), 1):
            if not (kept / name / "test-00000-of-00001.parquet").exists():
                print(corpus.write(kept / name, megabytes, seed), file=sys.stderr)
        small, sample, full = (kept / name for name in sizes)
        large = {"run_clm": sample, "nanogpt": sample, "wikift": full}
        figures = harness.interleave(
            {name: lambda n=name: contestant(n, small, large[n], work, tokenizer) for name in large}, given.rounds
        )
        timed(command("wikift", sample, work / "wikift-sample", tokenizer))
        same = (work / "wikift-sample/train.bin").read_bytes() == (work / "nanogpt-sample/train.bin").read_bytes()
        blocks = harness.interleave({"store": lambda: reading(work / f"wikift-{full.name}")}, given.rounds)
    name, _ = corpus.source_rows()
    harness.write(
        "data",
        "Text to tokens",
        [
            *harness.table(figures, against="run_clm", figure="MB/s"),
            "",
            "MB/s after start-up, parquet files to what training reads; memory is the largest process's.",
            f"wikift's store and nanoGPT's file of the sample are {'equal' if same else 'NOT equal'}, byte for byte.",
            "",
            f"The store of {given.megabytes:g} MB, warm page cache, one thread, 64 random blocks of {BLOCK} a time:",
            "",
            *harness.table(blocks, against="store", figure="Mtokens/s"),
        ],
        {**figures, **blocks},
        settings={"train MB": given.megabytes, "peers' MB": SAMPLE_MEGABYTES, "corpus": f"learned from the {name}"},
        about=harness.machine("wikift", "gigatoken", "tokenizers", "tiktoken", "datasets", "transformers", "pyarrow"),
    )


if __name__ == "__main__":
    main()
