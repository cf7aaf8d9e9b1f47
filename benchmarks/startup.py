"""From the command to what the user waits for, in fresh processes: --help, --dry-run, the end of the first step.

    python -m benchmarks.startup [--rounds 5]

The peer is what run_clm.py does (benchmarks/clm.py), with datasets' cache warm as wikift's store is; it has no dry run.
Both read the same weights (a GPT-2 of 124M), batch of one block of 64 tokens and precision, and are killed after the
first step.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from benchmarks.data import prepare, usual_tokenizer, write_corpus
from benchmarks.harness import ROOT, interleave, machine, options, table, timed, write
from wikift.model.gpt2 import resolve_precision

BLOCK = 64
OFFLINE = {"HF_HUB_OFFLINE": "1"}


def commands(work: Path, **shape: int) -> dict[str, tuple[list[str], Path]]:
    """Each contestant's command, on 1 MB of text and random weights, and the file that tells of its first step."""
    text = write_corpus(work / "text.parquet", 1.0)
    timed(prepare(text, work / "store", usual_tokenizer()))
    shutil.copytree(work / "store" / "tokenizer", work / "model")
    tokenizer = AutoTokenizer.from_pretrained(work / "model")
    end = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    GPT2LMHeadModel(GPT2Config(**shape, **end, vocab_size=len(tokenizer))).save_pretrained(work / "model")
    ours = [
        "--model", work / "model", "--data", work / "store", "--output-dir", work / "run", "--block-size", BLOCK,
        "--global-batch-size", 1, "--max-steps", 100, "--logging-steps", 1, "--resume", "never", "--device", "cpu",
    ]  # fmt: skip
    bf16 = resolve_precision("auto", torch.device("cpu")).name == "bf16"
    theirs = [
        "--model_name_or_path", work / "model", "--train_file", text, "--output_dir", work / "run", "--block_size",
        BLOCK, "--per_device_train_batch_size", 1, "--max_steps", 100, "--bf16", bf16, "--use_cpu", True,
        "--report_to", "none", "--do_train", True,
    ]  # fmt: skip
    return {
        "run_clm": ([sys.executable, "benchmarks/clm.py", *map(str, theirs)], work / "run" / "first_step"),
        "wikift": ([sys.executable, "launch/train.py", *map(str, ours)], work / "run" / "metrics.jsonl"),
    }


def started(name: str, command: Sequence[str], file: Path, work: Path) -> Mapping[str, float]:
    figures = {"--help s": timed([*command[:2], "--help"])[0]}
    if name == "wikift":
        shutil.rmtree(work / "run", ignore_errors=True)
        figures["--dry-run s"] = timed([*command, "--dry-run"], **OFFLINE)[0]
    return {**figures, "first step s": first_step(command, file, work)}


def first_step(command: Sequence[str], file: Path, work: Path) -> float:
    """Seconds until `file` has something in it; the command is killed then.

    Raises RuntimeError where it ends before.
    """
    shutil.rmtree(work / "run", ignore_errors=True)
    environment = {**os.environ, **OFFLINE, "HF_DATASETS_CACHE": str(work / "cache")}
    with open(work / "log", "wb") as log:
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        while not (file.exists() and file.stat().st_size):
            if process.poll() is not None:
                raise RuntimeError(f"{' '.join(command)}:\n{(work / 'log').read_text(errors='replace')[-4000:]}")
            time.sleep(0.002)
        seconds = time.perf_counter() - start
        process.kill()
        process.wait()
    return seconds


def main() -> None:
    """Run the contest."""
    given = options(__doc__, "startup", rounds=5, shape=(12, 768, 12)).parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        told = commands(work, n_layer=given.layers, n_embd=given.width, n_head=given.heads)
        contestants = {name: partial(started, name, *command, work) for name, command in told.items()}
        for contestant in contestants.values():
            contestant()  # caches of files and of maps
        figures = interleave(contestants, given.rounds)
    settings = {"layers": given.layers, "width": given.width, "tokens of the step": BLOCK}
    about, lines = machine("transformers", "accelerate", "datasets"), table(figures, "run_clm", "first step s")
    write(given, "Start-up", figures, lines, about=about, **settings)


if __name__ == "__main__":
    main()
