"""Do wikift and transformers' Trainer learn the same? Validation losses of both, from the same start, over seeds.

    python -m benchmarks.parity [--steps 250] [--seeds 1 2 3]

Both begin with the same random weights (2 layers of 128, fp32), take the same blocks in the same order, with the
Trainer's own AdamW, clipping and linear schedule, and are scored by `wikift evaluate`. Dropout on, only its masks
differ, so the losses should differ by less than two seeds' do; dropout off, by rounding. The Trainer is given each
block whole (block + 1 tokens, of which it predicts all but the first), so that both predict the same tokens. The text
is the tests' stand-in for WikiText (WIKIFT_TEST_DATA, see tests/real.py): Wikipedia's summaries to train on, 1.4M
tokens, and the first 400 rows of WikiText's own validation split, 37,000 tokens, to validate on.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import wikift
from benchmarks.harness import Figures, machine, options, table, write
from tests.real import WIKITEXT_MIRROR
from wikift.data.batches import BatchLayout, count_blocks, micro_batches
from wikift.data.store import open_store

VOCABULARY = 4096
BLOCK, BATCH = 128, 16  # tokens, blocks of a step
RATE, WARMUP = 2e-3, 25


def prepared(folder: Path) -> Path:
    """The text as a store, with a tokenizer of its own."""
    for split, rows in (("train", None), ("validation", 400)):
        (file,) = (WIKITEXT_MIRROR / "wikitext-103-v1").glob(f"{split}-*.parquet")
        (folder / "text").mkdir(parents=True, exist_ok=True)
        pq.write_table(pq.read_table(file).slice(0, rows), folder / "text" / f"{split}.parquet")
    settings = {"tokenizer": f"train:{VOCABULARY}", "append_eos": False, "workers": 1, "quiet": True}
    return wikift.prepare(dataset=folder / "text", out=folder / "store", **settings)


def initial(folder: Path, seed: int, store: Path) -> Path:
    """Random weights, as a Hugging Face directory; one position more than a block, for who feeds blocks whole."""
    torch.manual_seed(seed)
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 128, "n_positions": BLOCK + 1, "vocab_size": VOCABULARY}
    GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    shutil.copytree(store / "tokenizer", folder, dirs_exist_ok=True)
    return folder


def ours(store: Path, start: Path, run: Path, seed: int, dropout: float, steps: int) -> Path:
    """Train with wikift; gives the model's folder."""
    wikift.train(
        data=store, model=start, output_dir=run, block_size=BLOCK, seed=seed, dropout=dropout, max_steps=steps,
        global_batch_size=BATCH, per_device_train_batch_size=BATCH, learning_rate=RATE, warmup_steps=WARMUP,
        precision="fp32", device="cpu", quiet=True,
    )  # fmt: skip
    return wikift.consolidate(run)


def theirs(store: Path, start: Path, run: Path, seed: int, dropout: float, steps: int) -> Path:
    """Train with transformers' Trainer; gives the model's folder."""
    tokens = open_store(store).tokens("train")
    items = np.arange(count_blocks(len(tokens), BLOCK))
    stream = micro_batches(tokens, items, BatchLayout(BLOCK, BATCH), run_seed=seed)
    blocks = torch.cat([step[0] for step in islice(stream, steps)])  # (steps * BATCH, BLOCK + 1), in order
    targets = blocks.clone()
    targets[:, 0] = -100  # nothing predicts it, but the Trainer would count it in the divisor of its loss
    rows: Any = [{"input_ids": block, "labels": labels} for block, labels in zip(blocks, targets, strict=True)]

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return torch.utils.data.SequentialSampler(blocks)

    rates = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    arguments = TrainingArguments(
        str(run), max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=RATE, warmup_steps=WARMUP,
        seed=seed, logging_strategy="no", save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = InOrder(GPT2LMHeadModel.from_pretrained(start, **rates), arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(str(run))
    shutil.copytree(store / "tokenizer", run, dirs_exist_ok=True)
    return run


def main() -> None:
    """Train, score, compare."""
    parser = options(__doc__, "parity", rounds=1)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    given = parser.parse_args()
    figures: Figures = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = prepared(folder)
        for seed in given.seeds:
            start = initial(folder / f"initial-{seed}", seed, store)
            for dropout in (0.1, 0.0):
                for who, train in (("wikift", ours), ("Trainer", theirs)):
                    run = folder / f"{who}-{seed}-{dropout}"
                    model = train(store, start, run, seed, dropout, given.steps)
                    asked: dict[str, Any] = {"split": "validation", "protocol": "blocks", "context": BLOCK}
                    loss = wikift.evaluate(model, data=store, device="cpu", **asked)[0].score.loss
                    print(f"{run.name}: {loss}", file=sys.stderr, flush=True)
                    figures.setdefault(who, {}).setdefault(f"loss, dropout {dropout:g}", []).append(loss)
    lines = [*table(figures, "Trainer"), ""]
    for figure, own in figures["wikift"].items():
        gaps = ", ".join(f"{a - b:+.2g}" for a, b in zip(own, figures["Trainer"][figure], strict=True))
        spread = f"; standard deviation over seeds {statistics.stdev(own):.3g}" if len(own) > 1 else ""
        lines.append(f"- {figure}: wikift - Trainer, each seed: {gaps}{spread}")
    settings = {"steps": given.steps, "seeds": given.seeds, "blocks a step": BATCH, "tokens a block": BLOCK}
    about = machine("transformers", "accelerate")
    write(given, "wikift and the Trainer learn the same", figures, lines, about=about, **settings)


if __name__ == "__main__":
    main()
