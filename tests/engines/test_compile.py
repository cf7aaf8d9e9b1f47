"""--compile: the same run, compiled once and not again for validation, short windows or samples."""

from __future__ import annotations

import warnings

import pytest
import torch

from tests.ranks import run_ranks
from tests.tiny import VOCABULARY
from tests.tiny_engines import BLOCK, make_engine, random_start, tiny_config


def steps(kind: str, compile: bool, dropout: float = 0.1) -> tuple[list[float], int, int, dict[str, int]]:
    """Losses and norms of three steps with validation between them; graphs of the first step, of later ones, breaks."""
    from torch._dynamo.utils import counters

    from wikift.base.world import start_world

    warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, while it compiles
    world = start_world("cpu")
    config = tiny_config(dropout)
    engine = make_engine(kind, world, config, micro=2, accumulation=2, compile=compile)
    engine.restore(random_start(config))
    data = torch.Generator().manual_seed(1)
    numbers, graphs = [], []
    for _ in range(3):
        torch.manual_seed(3)
        for last in (False, True):
            blocks = torch.randint(VOCABULARY, (2, BLOCK + 1), generator=data)
            numbers.append(float(engine.forward_backward(blocks, last=last)))
        numbers.append(float(engine.step(1e-3)))
        for rows, length in ((2, BLOCK), (1, BLOCK), (1, 3)):
            window = torch.randint(VOCABULARY, (rows, length), generator=data)
            numbers.append(float(engine.nll(window, window)))
        ones = torch.ones(1, 5, dtype=torch.int64)
        engine.next_logits(ones, ones, torch.arange(5)[None])
        graphs.append(counters["stats"]["unique_graphs"])
    return numbers, graphs[0], graphs[-1] - graphs[0], dict(counters["graph_break"])


@pytest.mark.parametrize(
    "kind", ["single", "fsdp", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("ddp", "zero1"))]
)
def test_compiled_once_and_the_same_run(kind: str) -> None:
    ranks = 1 if kind == "single" else 2
    eager = run_ranks(steps, ranks, kind, False, timeout_seconds=200)
    compiled = run_ranks(steps, ranks, kind, True, timeout_seconds=200)
    for (right, none, *_), (found, first, later, breaks) in zip(eager, compiled, strict=True):
        assert found == pytest.approx(right, rel=1e-5)
        assert none == 0
        assert first == 1, "a block was compiled for itself: torch stops doing so after eight, and they have twelve"
        assert later == 0, "compiled again"
        assert not breaks
