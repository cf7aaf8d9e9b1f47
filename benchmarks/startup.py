"""From the command to what the user waits for, in fresh processes: --help, --dry-run, the end of the first step.

    python -m benchmarks.startup [--rounds 5] [--compiled]

The peer is what run_clm.py does (benchmarks/peer_clm.py), with datasets' cache warm as wikift's store is; it has no dry
run. Both read the same weights (a GPT-2 of 124M), batch of one block of 64 tokens and precision, and are killed after
the first step. --compiled adds both with torch.compile, whose caches a first start has warmed.
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

from benchmarks import corpus
from benchmarks.harness import ROOT, interleave, machine, options, table, timed, write

BLOCK = 64
OFFLINE = {"HF_HUB_OFFLINE": "1"}


def main() -> None:
    """Run the contest."""
    parser = options(__doc__, "startup", rounds=5)
    parser.add_argument("--compiled", action="store_true")
    for name, default in (("layers", 12), ("width", 768), ("heads", 12)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        prepare(work, n_layer=given.layers, n_embd=given.width, n_head=given.heads)
        commands = {"run_clm": run_clm(work), "wikift": wikift(work)}
        contestants = {name: partial(started, name, *command, work) for name, command in commands.items()}
        if given.compiled:
            asked = {"run_clm": ["--torch_compile", "True"], "wikift": ["--compile"]}
            for name, words in asked.items():
                start, file = commands[name]
                contestants[f"{name}, compiled"] = partial(first_step, [*start, *words], file, work)
        for contestant in contestants.values():
            contestant()  # caches of files, of maps, of the compiler
        figures = interleave(contestants, given.rounds)
    write(
        given.name, "Start-up", table(figures, against="run_clm", figure="first step s"), figures,
        settings={"layers": given.layers, "width": given.width, "tokens of the step": BLOCK},
        about=machine("transformers", "accelerate", "datasets"), folder=given.results,
        against=dict.fromkeys(figures, "run_clm"),
    )  # fmt: skip


def prepare(work: Path, **shape: int) -> None:
    """A corpus of 1 MB, its store, and a model with random weights and the tokenizer."""
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    from tests.real import GPT2_TOKENIZER

    corpus.write(work / "text", 1.0)
    tokenizer = str(GPT2_TOKENIZER) if GPT2_TOKENIZER.is_dir() else "train:8192"
    words = ["--dataset", str(work / "text"), "--tokenizer", tokenizer, "--out", str(work / "store"), "--quiet"]
    timed([sys.executable, "launch/prepare.py", *words])
    shutil.copytree(work / "store" / "tokenizer", work / "model")
    torch.manual_seed(0)
    made = AutoTokenizer.from_pretrained(work / "model")
    end = {"bos_token_id": made.eos_token_id, "eos_token_id": made.eos_token_id}
    GPT2LMHeadModel(GPT2Config(**shape, **end, vocab_size=len(made))).save_pretrained(work / "model")


def wikift(work: Path) -> tuple[list[str], Path]:
    """The command, and the file that tells of its first step."""
    words = [
        "--model", work / "model", "--data", work / "store", "--output-dir", work / "run", "--block-size", BLOCK,
        "--global-batch-size", 1, "--max-steps", 100, "--logging-steps", 1, "--resume", "never", "--device", "cpu",
    ]  # fmt: skip
    return [sys.executable, "launch/train.py", *map(str, words)], work / "run" / "metrics.jsonl"


def run_clm(work: Path) -> tuple[list[str], Path]:
    import torch

    from wikift.model.gpt2 import resolve_precision

    bf16 = resolve_precision("auto", torch.device("cpu")).name == "bf16"
    text = sorted((work / "text").glob("train-*"))[0]
    words = [
        "--model_name_or_path", work / "model", "--train_file", text, "--output_dir", work / "run", "--block_size",
        BLOCK, "--per_device_train_batch_size", 1, "--max_steps", 100, "--bf16", bf16, "--use_cpu", True,
        "--report_to", "none",
    ]  # fmt: skip
    return [sys.executable, "benchmarks/peer_clm.py", *map(str, words)], work / "run" / "first_step"


def started(name: str, command: Sequence[str], file: Path, work: Path) -> Mapping[str, float]:
    found = {"--help s": timed([*command[:2], "--help"])[0]}
    if name == "wikift":
        shutil.rmtree(work / "run", ignore_errors=True)
        found["--dry-run s"] = timed([*command, "--dry-run"], OFFLINE)[0]
    return {**found, **first_step(command, file, work)}


def first_step(command: Sequence[str], file: Path, work: Path) -> Mapping[str, float]:
    """Seconds until `file` has something in it; the command is killed then.

    Raises RuntimeError where it ends before.
    """
    shutil.rmtree(work / "run", ignore_errors=True)
    environment = {**os.environ, **OFFLINE, "HF_DATASETS_CACHE": str(work / "cache")}
    with open(work / "log", "w+b") as log:
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        while not (file.exists() and file.stat().st_size):
            if process.poll() is not None:
                log.seek(0)
                text = log.read().decode(errors="replace")
                raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{text[-4000:]}")
            time.sleep(0.002)
        seconds = time.perf_counter() - start
        process.kill()
        process.wait()
    return {"first step s": seconds}


if __name__ == "__main__":
    main()
