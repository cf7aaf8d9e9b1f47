"""Do wikift and transformers' Trainer learn the same? Validation curves of both, from the same start, over seeds.

    pip install -r benchmarks/requirements.txt
    python -m benchmarks.parity [--steps 250] [--seeds 1 2 3]

Both begin with the same weights, take the same blocks in the same order, with the Trainer's own AdamW, clipping and
linear schedule, and are scored by one function on one validation text. Dropout on, only its masks differ, so the
curves should differ by less than two seeds do; dropout off, by rounding. The Trainer is given each block whole
(block + 1 tokens, of which it predicts all but the first), so that both predict the same tokens.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import small
from benchmarks.harness import RESULTS, Figures, machine, write
from benchmarks.small import BLOCK, Curve

BATCH = 16  # blocks a step
RATE, WARMUP, EVERY = 2e-3, 25, 25  # learning rate, steps, steps between validations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "wikift-parity")
    given = parser.parse_args()
    small.store(given.folder / "store")
    for seed in given.seeds:
        small.initial(given.folder / f"initial-{seed}", seed)
    jobs = [Job(given.folder, given.steps, name, seed, 0.1) for seed in given.seeds for name in ("wikift", "Trainer")]
    jobs += [Job(given.folder, given.steps, name, given.seeds[0], 0.0) for name in ("wikift", "Trainer")]
    figures: Figures = {}
    for job, curve in zip(jobs, small.side_by_side(trained, jobs), strict=True):
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


def trained(job: Job) -> Curve:
    if job.name == "Trainer":
        return trainer_curve(job.folder, job.seed, job.dropout, job.steps)
    return small.train(
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

    store = open_store(folder / "store")
    tokens = store.tokens("train")
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
                    lambda inputs, targets: losses(inputs, targets).double().sum(), store.tokens("validation"),
                    store.splits["validation"], context=BLOCK, batch=8, world=World(),
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
