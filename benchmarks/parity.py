"""Do wikift and transformers' Trainer learn the same? Validation curves of both, from the same start, over seeds.

    pip install -r benchmarks/requirements.txt
    python -m benchmarks.parity [--steps 250] [--seeds 1 2 3]

Both begin with the same weights, take the same blocks in the same order, with the Trainer's own AdamW, clipping and
linear schedule, and are scored by one function on one validation text. Dropout on, only its masks differ, so the
curves should differ by less than two seeds do; dropout off, by rounding. The Trainer is given each block whole
(block + 1 tokens, of which it predicts all but the first), so that both predict the same tokens. The text is the tests'
stand-in for WikiText (WIKIFT_TEST_DATA, see tests/real.py): Wikipedia's summaries to train on, 1.4M tokens, and the
first 400 rows of WikiText's own validation split, 37,000 tokens, to validate on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import RESULTS, Figures, cores, machine, write
from tests.real import WIKITEXT_MIRROR

VOCABULARY = 4096
BLOCK = 128  # tokens
Curve = dict[int, float]  # step -> validation loss
BATCH = 16  # blocks a step
RATE, WARMUP, EVERY = 2e-3, 25, 25  # learning rate, steps, steps between validations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "wikift-parity")
    given = parser.parse_args()
    store(given.folder / "store")
    for seed in given.seeds:
        initial(given.folder / f"initial-{seed}", seed)
    jobs = [Job(given.folder, given.steps, name, seed, 0.1) for seed in given.seeds for name in ("wikift", "Trainer")]
    jobs += [Job(given.folder, given.steps, name, given.seeds[0], 0.0) for name in ("wikift", "Trainer")]
    figures: Figures = {}
    for job, curve in zip(jobs, side_by_side(jobs), strict=True):
        values = figures.setdefault(job.name + ("" if job.dropout else ", dropout 0"), {})
        for step, loss in curve.items():
            values.setdefault(str(step), []).append(loss)
    picture(figures, given.seeds, RESULTS / "parity.png")
    settings = {
        "model": "GPT-2, 2 layers of 128, vocabulary 4,096, random weights", "tokens a block": BLOCK,
        "blocks a step": BATCH, "steps": given.steps, "learning rate": RATE, "warm-up steps": WARMUP,
        "schedule": "linear", "dropout": 0.1, "precision": "fp32", "seeds": ", ".join(map(str, given.seeds)),
        "text": "the tests' stand-in for wikitext-103-v1, first 400 rows of WikiText's validation split",
    }  # fmt: skip
    how = "Validation losses in nats per token, each seed's in parity.json"
    lines = [*compared(figures), "", "![validation loss by step](parity.png)"]
    about = machine("transformers", "accelerate")
    write("parity", "wikift and the Trainer learn the same", lines, figures, settings=settings, about=about, how=how)


class Job(NamedTuple):
    """One training."""

    folder: Path
    steps: int
    name: str  # wikift or Trainer
    seed: int
    dropout: float


def store(folder: Path) -> Path:
    """Prepare the text, once, with a tokenizer of its own."""
    import pyarrow.parquet

    from wikift.commands.prepare import main

    if not (folder / "store.json").exists():
        text = folder.with_name("text")
        text.mkdir(parents=True, exist_ok=True)
        for split, rows in (("train", None), ("validation", 400)):
            (file,) = (WIKITEXT_MIRROR / "wikitext-103-v1").glob(f"{split}-*.parquet")
            pyarrow.parquet.write_table(pyarrow.parquet.read_table(file).slice(0, rows), text / f"{split}.parquet")
        asked = ["--dataset", str(text), "--tokenizer", f"train:{VOCABULARY}", "--no-append-eos", "--out", str(folder)]
        assert main([*asked, "--workers", "1", "--quiet"]) == 0
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


def side_by_side(jobs: list[Job]) -> list[Curve]:
    """Each job's curve, on as many processes of one thread as there are cores: time is not asked for."""
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # the processes take them over
    curves = []
    with ProcessPoolExecutor(cores(), mp_context=multiprocessing.get_context("spawn")) as pool:
        for job, curve in zip(jobs, pool.map(trained, jobs), strict=True):
            print(f"{job}: {curve}", file=sys.stderr, flush=True)
            curves.append(curve)
    return curves


def trained(job: Job) -> Curve:
    if job.name == "Trainer":
        return trainer_curve(job.folder, job.seed, job.dropout, job.steps)
    return train(
        job.folder / f"run-{job.seed}-{job.dropout}", "--data", str(job.folder / "store"),
        "--model", str(job.folder / f"initial-{job.seed}"), "--block-size", str(BLOCK), "--seed", str(job.seed),
        "--global-batch-size", str(BATCH), "--per-device-train-batch-size", str(BATCH), "--dropout", str(job.dropout),
        "--learning-rate", str(RATE), "--warmup-steps", str(WARMUP), "--max-steps", str(job.steps),
        "--eval-steps", str(EVERY),
    )  # fmt: skip


def trainer_curve(folder: Path, seed: int, dropout: float, steps: int) -> Curve:
    """Train with transformers' Trainer; gives its validation losses by step."""
    import numpy as np
    import torch
    from transformers import GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    from wikift.base.world import World
    from wikift.data.batches import BatchLayout, count_blocks, micro_batches
    from wikift.data.store import open_store
    from wikift.evaluation.score import score_split
    from wikift.model.gpt2 import NextTokenLoss

    text = open_store(folder / "store")
    tokens = text.tokens("train")
    items = np.arange(count_blocks(len(tokens), BLOCK))
    stream = micro_batches(tokens, items, BatchLayout(BLOCK, BATCH), run_seed=seed)
    blocks = torch.cat([step[0] for step in islice(stream, steps)])  # (steps * BATCH, BLOCK + 1), in order
    rates = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    model = GPT2LMHeadModel.from_pretrained(folder / f"initial-{seed}", **rates)
    curve: Curve = {}

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return torch.utils.data.SequentialSampler(blocks)

    class Validation(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % EVERY and state.global_step != steps:
                return
            model.eval()
            losses = NextTokenLoss(model)
            with torch.no_grad():
                score = score_split(
                    lambda inputs, targets: losses(inputs, targets).double().sum(), text.tokens("validation"),
                    text.splits["validation"], context=BLOCK, batch=8, world=World(),
                )  # fmt: skip
            model.train()
            curve[state.global_step] = score.loss

    with tempfile.TemporaryDirectory() as output:
        arguments = TrainingArguments(
            output, max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=RATE, warmup_steps=WARMUP,
            seed=seed, logging_strategy="no", save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        targets = blocks.clone()
        targets[:, 0] = -100  # nothing predicts it, but the Trainer would count it in the divisor of its loss
        items = [{"input_ids": block, "labels": labels} for block, labels in zip(blocks, targets, strict=True)]
        InOrder(model, arguments, train_dataset=items, callbacks=[Validation()]).train()  # type: ignore[arg-type]
    return curve


def compared(figures: Figures) -> list[str]:
    """Markdown: the curves' means, their differences, and how far two seeds of one are apart."""
    ours, theirs = figures["wikift"], figures["Trainer"]
    ours_exact, theirs_exact = figures["wikift, dropout 0"], figures["Trainer, dropout 0"]
    lines = [
        "| step | wikift, mean | Trainer, mean | wikift - Trainer, mean | wikift - Trainer, largest of one seed "
        "| standard deviation over seeds, wikift / Trainer | dropout 0: wikift - Trainer |",
        "|---|" + "---:|" * 6,
    ]
    inside = 0
    for step, ours_now in ours.items():
        theirs_now = theirs[step]
        gaps = [a - b for a, b in zip(ours_now, theirs_now, strict=True)]
        spread = [statistics.stdev(values) if len(values) > 1 else float("nan") for values in (ours_now, theirs_now)]
        inside += abs(statistics.mean(gaps)) < min(spread)
        lines.append(
            f"| {step} | {statistics.mean(ours_now):.4f} | {statistics.mean(theirs_now):.4f} | "
            f"{statistics.mean(gaps):+.4f} | {max(gaps, key=abs):+.4f} | {spread[0]:.4f} / {spread[1]:.4f} | "
            f"{ours_exact[step][0] - theirs_exact[step][0]:+.1e} |"
        )
    words = f"in {inside} of {len(ours)} validations."
    return [*lines, "", f"The means differ by less than the smaller of the two standard deviations over seeds {words}"]


def picture(figures: Figures, seeds: list[int], file: Path) -> None:
    """Each seed's curve: wikift drawn through, the Trainer dashed; below, the same seed's difference."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    whole, (above, below) = pyplot.subplots(2, 1, figsize=(7, 7), sharex=True, height_ratios=[3, 1])
    steps = [int(step) for step in figures["wikift"]]
    for number, seed in enumerate(seeds):
        curves = {name: [losses[number] for losses in figures[name].values()] for name in ("wikift", "Trainer")}
        above.plot(steps, curves["wikift"], color=f"C{number}", label=f"wikift, seed {seed}")
        above.plot(steps, curves["Trainer"], color=f"C{number}", linestyle="--", label=f"Trainer, seed {seed}")
        gap = [a - b for a, b in zip(curves["wikift"], curves["Trainer"], strict=True)]
        below.plot(steps, gap, color=f"C{number}")
    exact = [figures[f"{name}, dropout 0"].values() for name in ("wikift", "Trainer")]
    gap = [a[0] - b[0] for a, b in zip(*exact, strict=True)]
    below.plot(steps, gap, color="black", linestyle=":", label=f"dropout 0, seed {seeds[0]}")
    above.set_ylabel("validation loss, nats per token")
    above.legend(ncols=2)
    below.set_ylabel("wikift - Trainer")
    below.set_xlabel("step")
    below.legend()
    whole.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    whole.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
