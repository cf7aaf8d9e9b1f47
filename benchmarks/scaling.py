"""Several ranks: tokens/s on 1, 2, 4 gloo ranks of one thread under every engine, and of one process of two threads.

    python -m benchmarks.scaling [--rounds 3] [--steps 4] [--ranks 1 2 4] [--only NAME ...]

The global batch is the same everywhere. Tokens per second of the wall clock, and of processor time: all ranks'
together, on which other work on the machine weighs less. Many GPUs, on paper: benchmarks/scaling_paper.py.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import Contestant, Figures, interleave, machine, median, options, ratio, write
from benchmarks.scaling_paper import ENGINES

DS_CONFIGS = Path(__file__).resolve().parent.parent / "ds_configs"


def trained(kind: str, threads: int, steps: int, layers: int, width: int, batch: int) -> dict[str, float]:
    """On one rank: its seconds and processor seconds of `steps` steps of `batch` blocks over all ranks."""
    import torch

    from tests.tiny_engines import make_engine, random_start, tiny_config
    from wikift.base.world import start_world
    from wikift.engines.memory import keep_freed_memory
    from wikift.settings import deepspeed as dsconfig

    keep_freed_memory()  # as launch/train.py does
    world = start_world("cpu")
    torch.set_num_threads(threads)
    config = tiny_config(n_layer=layers, n_embd=width, n_head=width // 64, n_positions=256, vocab_size=8192)
    micro = batch // world.size
    options: dict[str, Any] = {"reshard": kind != "fsdp whole"}
    if kind.startswith("zero"):
        options = {"ds_config": dsconfig.read(DS_CONFIGS / f"{kind}.json")[0]}
    engine = make_engine(kind.split()[0], world, config, micro=micro, **options)
    engine.restore(random_start(config))
    data = torch.Generator().manual_seed(1)
    begun, used = 0.0, 0.0
    for step in range(steps + 1):
        if step == 1:  # the first is the warm-up
            world.barrier()
            begun, used = time.perf_counter(), time.process_time()
        blocks = torch.randint(8192, (batch, 257), generator=data)[world.rank :: world.size]
        engine.forward_backward(blocks, last=True)
        engine.step(1e-4)
    world.barrier()
    return {"wall": time.perf_counter() - begun, "processor": time.process_time() - used}


def contestant(kind: str, ranks: int, threads: int, given: argparse.Namespace) -> dict[str, float]:
    from tests.ranks import run_ranks

    found = run_ranks(
        trained, ranks, kind, threads, given.steps, given.layers, given.width, given.batch, timeout_seconds=900
    )
    tokens = given.steps * given.batch * 256
    return {
        "tokens/s": tokens / max(each["wall"] for each in found),
        "tokens per processor second": tokens / sum(each["processor"] for each in found),
    }


ONE = "one process of one thread"
TWO_THREADS = "one process of two threads"


def measure(given: argparse.Namespace) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # of a rank; `trained` sets its own
    contestants: dict[str, Contestant] = {
        ONE: partial(contestant, "single", 1, 1, given), TWO_THREADS: partial(contestant, "single", 1, 2, given)
    }  # fmt: skip
    for ranks in given.ranks:
        for engine in ENGINES:
            if ranks > 1 or engine not in ("ddp", "fsdp whole"):
                contestants[f"{engine}, {ranks} ranks"] = partial(contestant, engine, ranks, 1, given)
    wanted = {
        name: run for name, run in contestants.items()
        if not given.only or name in (ONE, TWO_THREADS) or any(part in name for part in given.only)
    }  # fmt: skip
    figures = interleave(wanted, given.rounds)
    settings: Mapping[str, Any] = {
        "model": f"GPT-2, {given.layers} layers of {given.width}, vocabulary 8,192", "tokens a block": 256,
        "blocks a step, all ranks": given.batch, "steps": given.steps, "precision": "fp32", "backend": "gloo",
    }  # fmt: skip
    write(
        given.name, "Several ranks", compared(figures), figures,
        settings=settings, about=machine("deepspeed"), folder=given.results,
    )  # fmt: skip


def compared(figures: Figures) -> list[str]:
    """Markdown: both rates, the wall clock's against two threads, the processor's against one."""
    wall, used = "tokens/s", "tokens per processor second"
    lines = [f"| | {wall} | times {TWO_THREADS} | {used} | times {ONE} |", "|---" + "|---:" * 4 + "|"]
    for name in figures:
        shown = []
        for figure, against in ((wall, TWO_THREADS), (used, ONE)):
            low, middle, high = ratio(figures, name, against, figure)
            shown.append(f"{median(figures, name, figure):,.0f} | {middle:.3f} ({low:.3f} to {high:.3f})")
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return lines


def main() -> None:
    parser = options(__doc__, "scaling", rounds=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--only", nargs="+", help="parts of names, as 'ddp, 2'")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8, help="blocks a step, over all ranks")
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
