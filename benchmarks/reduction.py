"""What adding up the gradients, or the residual, in bf16 does to the loss: docs/explanation/experiments.md.

    python -m benchmarks.reduction [--steps 150] [--seeds 1 2 3]

The small model of benchmarks/small.py, trained from the same initial weights on the same blocks under each engine, in
fp32 but for the reduction; validation losses at the end. Products in bf16 are there as a measure.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from benchmarks import small
from benchmarks.harness import Figures, machine, write
from tests.ranks import run_ranks

EXACT = "ddp, 2 ranks"
RUNS: dict[str, tuple[int, list[str]]] = {  # ranks, options
    EXACT: (2, ["--engine", "ddp"]),
    "ddp, 2 ranks, --reduce-dtype bf16": (2, ["--engine", "ddp", "--reduce-dtype", "bf16"]),
    "fsdp, 2 ranks, --reduce-dtype bf16": (2, ["--engine", "fsdp", "--reduce-dtype", "bf16"]),
    "ddp, 2 ranks, --precision bf16": (2, ["--engine", "ddp"]),
    "ddp, 2 ranks, --precision bf16 --residual-dtype bf16": (2, ["--engine", "ddp", "--residual-dtype", "bf16"]),
}  # fmt: skip


def last_loss(run: str, words: list[str]) -> float:
    """On one rank: train; the last validation loss (nats per token)."""
    from wikift.commands.train import main

    assert main([*words, "--output-dir", run, "--resume", "never", "--quiet"]) == 0
    last = json.loads((Path(run) / "metrics.jsonl").read_text().splitlines()[-1])
    return float(last["eval_loss"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "wikift-reduction")
    given = parser.parse_args()
    store, start = small.store(given.folder / "store"), small.initial(given.folder / "initial", 0)
    figures: Figures = {name: {"loss": []} for name in RUNS}
    for seed in given.seeds:
        for name, (ranks, options) in RUNS.items():
            asked = [
                "--model", str(start), "--data", str(store), "--block-size", str(small.BLOCK), "--seed", str(seed),
                "--logging-steps", "100",
                "--global-batch-size", "16", "--per-device-train-batch-size", "8", "--learning-rate", "2e-3",
                "--warmup-steps", "0.1", "--dropout", "0", "--max-steps", str(given.steps), *options,
            ]  # fmt: skip
            asked += ["--precision", "bf16" if "precision" in name else "fp32"]
            found = run_ranks(last_loss, ranks, str(given.folder / "run"), asked, timeout_seconds=1800)
            figures[name]["loss"].append(found[0])
            print(seed, name, found[0], flush=True)
    settings = {
        "model": "GPT-2, 2 layers of 128", "tokens a block": small.BLOCK, "blocks a step": 16,
        "dropout": 0, "steps": given.steps, "seeds": ", ".join(map(str, given.seeds)),
    }  # fmt: skip
    how = "Validation losses at the end in nats per token, each seed's in reduction.json"
    lines = compared(figures)
    write("reduction", "Gradients added up in bf16", lines, figures, settings=settings, about=machine(), how=how)


def compared(figures: Figures) -> list[str]:
    """Markdown: each run's mean, and how far it lies from the exact one of the same seed."""
    lines = [f"| | loss, mean over seeds | minus that of {EXACT}, each seed's |", "|---|---:|---|"]
    for name, values in figures.items():
        losses = values["loss"]
        gaps = [one - exact for one, exact in zip(losses, figures[EXACT]["loss"], strict=True)]
        lines.append(f"| {name} | {sum(losses) / len(losses):.4f} | {', '.join(f'{gap:+.5f}' for gap in gaps)} |")
    return lines


if __name__ == "__main__":
    main()
