"""Training steps of wikift and of its peers, in turns, each in a process that lives through all rounds.

    python -m benchmarks.train                      # what pip install -r benchmarks/requirements.txt lets take part
    python -m benchmarks.train --rounds 3 --only "wikift|Trainer" --micro-batch 16 --accumulation 2

Same model, block, batch, precision, dropout, clipping and random tokens. Tokens per second, memory, processor seconds
of a step, and the seconds to the end of the first step (compilation, with warm or cold caches as they are).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from functools import partial

import torch

from benchmarks.harness import ROOT, interleave, machine, table, write
from benchmarks.peers_train import CONTESTANTS, Setting


def main() -> None:
    native = "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="of one turn")
    parser.add_argument("--only", default="", help="a pattern: the contestants that take part")
    parser.add_argument("--against", default="Trainer")
    parser.add_argument("--name", default="train", help="of the files in benchmarks/results/")
    for name, default in (("layers", 6), ("width", 384), ("heads", 6), ("block", 256), ("micro-batch", 4),
                          ("accumulation", 1), ("vocabulary", 50257), ("threads", cores)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default=native)
    given = parser.parse_args()
    setting = Setting(**{f.name: getattr(given, f.name) for f in dataclasses.fields(Setting)})
    names = [name for name in CONTESTANTS if re.search(given.only, name)]
    processes = {name: Process(name, setting) for name in names}
    figures = interleave({name: partial(p.turn, given.steps) for name, p in processes.items()}, given.rounds)
    for name, process in processes.items():
        figures[name]["first step, s"] = [process.first_step_s] * given.rounds
    against = given.against if given.against in figures else names[0]
    write(
        given.name,
        "Training steps",
        table(figures, against=against, figure="tokens/s"),
        figures,
        settings={**dataclasses.asdict(setting), "steps of a turn": given.steps},
        about=machine("transformers", "accelerate", "deepspeed"),
    )


class Process:
    """A contestant, started and past its first step."""

    def __init__(self, name: str, setting: Setting) -> None:
        self.tokens = setting.block * setting.micro_batch * setting.accumulation
        start = [sys.executable]
        self.ranks = 2 if "2 ranks" in name else 1
        if self.ranks > 1:  # the same global batch and as many threads in all
            setting = dataclasses.replace(
                setting, micro_batch=setting.micro_batch // 2, threads=max(1, setting.threads // 2)
            )
            start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        start += ["-m", "benchmarks.peers_train", name, json.dumps(dataclasses.asdict(setting))]
        self.process = subprocess.Popen(
            start, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.first_step_s = self._answer()["first_step_s"]
        print(f"{name}: first step after {self.first_step_s:.1f} s", file=sys.stderr, flush=True)

    def turn(self, steps: int) -> Mapping[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        found = self._answer()
        return {
            "tokens/s": self.tokens / found["step_s"],
            "processor s a step": found["cpu_s"] * self.ranks,
            "peak GB": found["peak_gb"] * self.ranks,
        }

    def _answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                try:
                    return dict(json.loads(line))
                except ValueError:
                    continue  # the Trainer's own log
        raise RuntimeError(f"a contestant ended with {self.process.wait()}: {self.process.args}")


if __name__ == "__main__":
    main()
