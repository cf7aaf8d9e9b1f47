"""What helps fine-tuning? Each option against the defaults, over seeds, on a small model.

    python -m benchmarks.options [--steps 150] [--seeds 1 2 3] [--only NAME ...]

A GPT-2 of two layers is trained on Wikipedia's summaries, then fine-tuned on WikiText's articles (most of its
validation split, in place of the train split that is not at hand) and validated on articles it has not seen. Optimizers
that wikift has not are tried in a plain loop on the same blocks; "AdamW, plain loop" shows that it is wikift's run.
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
from pathlib import Path
from typing import NamedTuple

from benchmarks import small
from benchmarks.harness import Figures, machine, write
from benchmarks.small import BLOCK
from wikift.commands import consolidate
from wikift.settings.fields import ConsolidateSettings

BATCH, RATE = 8, 3e-3  # blocks a step, learning rate
PLAIN = {"AdamW, plain loop": "adamw", "Muon (torch.optim)": "muon"}
DEFAULTS = "defaults: linear to 0, no warm-up, dropout 0.1"
OPTIONS: dict[str, list[str]] = {
    DEFAULTS: [],
    "--warmup-steps 0.1": ["--warmup-steps", "0.1"],
    "--lr-scheduler-type cosine": ["--lr-scheduler-type", "cosine"],
    "--lr-scheduler-type constant": ["--lr-scheduler-type", "constant"],
    "warmup_stable_decay, --decay-steps 0.2": ["--lr-scheduler-type", "warmup_stable_decay"],
    "warmup_stable_decay, --decay-steps 0.5": ["--lr-scheduler-type", "warmup_stable_decay", "--decay-steps", "0.5"],
    "--dropout 0": ["--dropout", "0"],
    "--dropout 0.2": ["--dropout", "0.2"],
    "--learning-rate 1e-3": ["--learning-rate", "1e-3"],
    "--learning-rate 6e-3": ["--learning-rate", "6e-3"],
    "--weight-decay 0.1": ["--weight-decay", "0.1"],
}
SHORT_FIRST = "half of the steps in blocks of 64, constant, then of 128"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", help="parts of names")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "wikift-options")
    given = parser.parse_args()
    prepare(given.folder)
    every = [*OPTIONS, SHORT_FIRST, *PLAIN]
    names = [name for name in every if not given.only or any(part in name for part in (*given.only, DEFAULTS))]
    jobs = [Job(given.folder, given.steps, name, seed) for seed in given.seeds for name in names]
    figures: Figures = {name: {"loss": []} for name in names}
    for job, loss in zip(jobs, small.side_by_side(tuned, jobs), strict=True):
        figures[job.name]["loss"].append(loss)
    settings = {
        "model": "GPT-2, 2 layers of 128, trained for 300 steps of 2,048 tokens on summaries", "tokens a block": BLOCK,
        "blocks a step": BATCH, "steps": given.steps, "learning rate": RATE, "precision": "fp32",
        "seeds": ", ".join(map(str, given.seeds)),
        "trained on": "rows 400 to 3,759 of WikiText's validation split", "validated on": "rows 0 to 399",
    }  # fmt: skip
    how = "Validation losses at the end in nats per token, each seed's in options.json"
    write("options", "What helps fine-tuning", compared(figures), figures, settings=settings, about=machine(), how=how)


def prepare(folder: Path) -> None:
    """The two stores, and the model to fine-tune."""
    small.store(folder / "store")
    small.store(folder / "articles", train=("validation", 400, None))
    if not (folder / "pretrained" / "hf").exists():
        start = small.initial(folder / "initial", 0)
        words = ["--model", str(start), "--data", str(folder / "store"), "--max-steps", "300", "--eval-steps", "300"]
        words += ["--block-size", str(BLOCK), "--global-batch-size", "16", "--learning-rate", "2e-3"]
        small.train(folder / "pretrained", *words, "--warmup-steps", "30")
        consolidated(folder / "pretrained")


class Job(NamedTuple):
    """One fine-tuning."""

    folder: Path
    steps: int
    name: str
    seed: int


def tuned(job: Job) -> float:
    """Fine-tune; gives the validation loss at the end."""
    if job.name in PLAIN:
        return plain_loss(job, PLAIN[job.name])
    if job.name == SHORT_FIRST:
        half = ["--max-steps", str(job.steps // 2)]
        short = [*half, "--block-size", str(BLOCK // 2), "--global-batch-size", str(2 * BATCH)]
        first, _ = wikift_run(job, "-short", [*short, "--lr-scheduler-type", "constant"])
        consolidated(first)
        return wikift_run(job, "-long", [*half, "--model", str(first / "hf")])[1]
    return wikift_run(job, "", OPTIONS[job.name])[1]


def wikift_run(job: Job, mark: str, words: list[str]) -> tuple[Path, float]:
    """Fine-tune with wikift; gives the run and its last validation loss."""
    words = ["--max-steps", str(job.steps), *words]
    asked = {
        "--data": str(job.folder / "articles"), "--model": str(job.folder / "pretrained" / "hf"),
        "--block-size": str(BLOCK), "--global-batch-size": str(BATCH),
        "--learning-rate": str(RATE), "--seed": str(job.seed), **dict(zip(words[::2], words[1::2], strict=True)),
    }  # fmt: skip
    run = job.folder / "runs" / f"{re.sub('[^a-z0-9]+', '-', job.name.lower())}{mark}-{job.seed}"
    curve = small.train(run, *(word for pair in asked.items() for word in pair))
    return run, curve[max(curve)]


def consolidated(run: Path) -> None:
    """Make RUN/hf."""
    consolidate.run(ConsolidateSettings(run=str(run)))


def plain_loss(job: Job, kind: str) -> float:
    """Fine-tune in a plain loop with another optimizer, its rate linear to 0."""
    import numpy as np
    import torch

    from wikift.base.world import World
    from wikift.base.world import seed as seed_of
    from wikift.data.batches import BatchLayout, count_blocks, micro_batches
    from wikift.data.store import open_store
    from wikift.engines.optim import Schedule
    from wikift.evaluation.score import score_split
    from wikift.model.gpt2 import NextTokenLoss, load_model

    folder, steps, _, seed = job
    store = open_store(folder / "articles")
    tokens = store.tokens("train")
    items = np.arange(count_blocks(len(tokens), BLOCK))
    stream = micro_batches(tokens, items, BatchLayout(BLOCK, BATCH), run_seed=seed)
    model = load_model(str(folder / "pretrained" / "hf"))
    losses = NextTokenLoss(model)
    # Muon is for the matrices inside; embeddings, biases and gains stay with AdamW (Jordan et al., 2024)
    inside = [p for name, p in model.named_parameters() if p.ndim == 2 and ".h." in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and ".h." in name)]
    optimizers: list[torch.optim.Optimizer]
    if kind == "muon":
        # this adjustment makes its updates as large as AdamW's, so that the same rate serves both
        muon = torch.optim.Muon(inside, lr=RATE, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        optimizers = [muon, torch.optim.AdamW(others, lr=RATE, weight_decay=0.0)]
    else:
        optimizers = [torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)]
    schedule = Schedule("linear", RATE, 0, steps)
    model.train()
    for step in range(1, steps + 1):
        torch.manual_seed(seed_of(seed, "dropout", step, 0))
        (blocks,) = next(stream)
        losses(blocks[:, :-1], blocks[:, 1:]).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = schedule.lr_at(step)
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        return score_split(
            lambda inputs, targets: losses(inputs, targets).double().sum(), store.tokens("validation"),
            store.splits["validation"], context=BLOCK, batch=8, world=World(),
        ).loss  # fmt: skip


def compared(figures: Figures) -> list[str]:
    """Markdown: the mean of each option, and how much lower its losses are than the same seed's with the defaults."""
    base = figures[DEFAULTS]["loss"]
    lines = ["| | validation loss, mean | minus the defaults', mean of the same seeds | lowest to highest |"]
    lines.append("|---|---:|---:|---:|")
    for name, values in figures.items():
        gaps = [a - b for a, b in zip(values["loss"], base, strict=True)]
        span = f"{min(gaps):+.4f} to {max(gaps):+.4f}"
        row = f"| {name} | {statistics.mean(values['loss']):.4f} | {statistics.mean(gaps):+.4f} | {span} |"
        lines.append(row)
    if len(base) > 1:
        lines += ["", f"Standard deviation of the defaults over seeds: {statistics.stdev(base):.4f}."]
    return lines


if __name__ == "__main__":
    main()
