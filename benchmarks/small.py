"""What is trained where only the course of a loss is asked for: a GPT-2 of two layers on English text, in a minute.

The text is the tests' stand-in for WikiText (WIKIFT_TEST_DATA, see tests/real.py): Wikipedia's summaries to train on,
1.4M tokens, and the first 400 rows of WikiText's own validation split, 37,000 tokens, to validate on.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

from tests.real import WIKITEXT_MIRROR

VOCABULARY = 4096
BLOCK = 128  # tokens
Curve = dict[int, float]  # step -> validation loss
Job, Result = TypeVar("Job"), TypeVar("Result")
Rows = tuple[str, int, int | None]  # split, first row, one past the last


def store(folder: Path, *, train: Rows = ("train", 0, None), validation: Rows = ("validation", 0, 400)) -> Path:
    """Prepare these rows, once. The tokenizer is the one of the first store made beside it, else trained on `train`."""
    import pyarrow.parquet

    from wikift.commands.prepare import main

    if (folder / "store.json").exists():
        return folder
    text = folder.with_name(folder.name + "-text")
    text.mkdir(parents=True, exist_ok=True)
    for name, (split, first, last) in (("train", train), ("validation", validation)):
        (file,) = (WIKITEXT_MIRROR / "wikitext-103-v1").glob(f"{split}-*.parquet")
        rows = pyarrow.parquet.read_table(file)
        pyarrow.parquet.write_table(rows.slice(first, (last or len(rows)) - first), text / f"{name}.parquet")
    shared = folder.with_name("store") / "tokenizer"
    tokenizer = str(shared) if shared.exists() else f"train:{VOCABULARY}"
    words = ["--dataset", str(text), "--tokenizer", tokenizer, "--no-append-eos", "--out", str(folder)]
    assert main([*words, "--workers", "1", "--quiet"]) == 0
    return folder


def initial(folder: Path, seed: int) -> Path:
    """Random weights, as a Hugging Face directory; one position more than a block, for who feeds blocks whole."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 128, "n_positions": BLOCK + 1, "vocab_size": VOCABULARY}
    GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    return folder


def train(run: Path, *words: str) -> Curve:
    """Run `launch/train.py` in this process; gives its validation losses."""
    from wikift.commands.train import main

    assert main([*words, "--output-dir", str(run), "--resume", "never", "--precision", "fp32", "--quiet"]) == 0
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {values["step"]: values["eval_loss"] for values in lines if "eval_loss" in values}


def side_by_side(work: Callable[[Job], Result], jobs: Sequence[Job]) -> list[Result]:
    """`work` on each job, on as many processes of one thread as there are cores: time is not asked for."""
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # the processes take them over
    cores = len(os.sched_getaffinity(0))
    found = []
    with ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("spawn")) as pool:
        for job, result in zip(jobs, pool.map(work, jobs), strict=True):
            print(f"{job}: {result}", file=sys.stderr, flush=True)
            found.append(result)
    return found
