"""AdamW with its rate linear to 0 against schedule-free AdamW, over epochs, rates and seeds: docs/experiments.md.

    python -m benchmarks.optimizers [--epochs 3] [--data-fraction 1] [--adamw RATE ...] [--schedulefree RATE ...]

The model, the fine-tuning and the texts of benchmarks/options.py.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import NamedTuple

from benchmarks import small
from benchmarks.harness import Figures, machine, write
from benchmarks.options import BATCH, prepare, wikift_run
from benchmarks.options import Job as OptionsJob
from benchmarks.small import BLOCK

WORDS = {"adamw": [], "schedulefree": ["--optimizer", "schedulefree", "--warmup-steps", "0.05"]}


class Job(NamedTuple):
    """One fine-tuning."""

    folder: Path
    kind: str
    rate: str
    seed: int
    length: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.kind}, rate {self.rate}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--epochs", default="3")
    parser.add_argument("--data-fraction", default="1")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--adamw", nargs="+", default=["2e-3", "3e-3"], metavar="RATE")
    parser.add_argument("--schedulefree", nargs="+", default=["3e-3", "6e-3"], metavar="RATE")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "wikift-options")
    given = parser.parse_args()
    prepare(given.folder)
    length = ("--num-train-epochs", given.epochs, "--data-fraction", given.data_fraction)
    rates = [*(("adamw", rate) for rate in given.adamw), *(("schedulefree", rate) for rate in given.schedulefree)]
    jobs = [Job(given.folder, kind, rate, seed, length) for seed in given.seeds for kind, rate in rates]
    figures: Figures = {job.name: {"loss": []} for job in jobs}
    for job, loss in zip(jobs, small.side_by_side(tuned, jobs), strict=True):
        figures[job.name]["loss"].append(loss)
    settings = {
        "model": "benchmarks/options.py's", "tokens a block": BLOCK, "blocks a step": BATCH, "epochs": given.epochs,
        "data fraction": given.data_fraction, "precision": "fp32", "seeds": ", ".join(map(str, given.seeds)),
    }  # fmt: skip
    lines = ["| | validation loss, mean | lowest to highest |", "|---|---:|---:|"]
    for name, values in figures.items():
        losses = values["loss"]
        lines.append(f"| {name} | {statistics.mean(losses):.4f} | {min(losses):.4f} to {max(losses):.4f} |")
    how = "Validation losses at the end in nats per token, each seed's in optimizers.json"
    write(
        "optimizers", "AdamW against schedule-free AdamW", lines, figures, settings=settings, about=machine(), how=how
    )


def tuned(job: Job) -> float:
    """Fine-tune; gives the validation loss at the end."""
    words = ["--learning-rate", job.rate, *WORDS[job.kind]]
    return wikift_run(OptionsJob(job.folder, 0, job.name, job.seed), "-epochs", words, length=list(job.length))[1]


if __name__ == "__main__":
    main()
