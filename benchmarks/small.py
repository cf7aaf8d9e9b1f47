"""What is trained where only the course of a loss is asked for: a GPT-2 of two layers on English text, in a minute.

The text is the tests' stand-in for WikiText (WIKIFT_TEST_DATA, see tests/real.py): Wikipedia's summaries to train on,
1.4M tokens, and the first 400 rows of WikiText's own validation split, 37,000 tokens, to validate on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.harness import ROOT
from tests.real import WIKITEXT_MIRROR

VOCABULARY = 4096
BLOCK = 128  # tokens
Curve = dict[int, float]  # step -> validation loss
Rows = tuple[str, int, int | None]  # split, first row, one past the last


def store(folder: Path, *, train: Rows = ("train", 0, None), validation: Rows = ("validation", 0, 400)) -> Path:
    """Prepare these rows, once. The tokenizer is the one of the first store made beside it, else trained on `train`."""
    import pyarrow.parquet

    from wikift.prepare import main

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
    """Run `launch/train.py` on one thread; gives its validation losses. Raises RuntimeError with what it said."""
    command = [sys.executable, "launch/train.py", *words, "--output-dir", str(run), "--precision", "fp32", "--quiet"]
    ran = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {ran.returncode}:\n{ran.stderr[-4000:]}")
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {values["step"]: values["eval_loss"] for values in lines if "eval_loss" in values}


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def pool() -> ThreadPoolExecutor:
    """As many runs at once as there are cores: their time is not asked for."""
    return ThreadPoolExecutor(len(os.sched_getaffinity(0)))
