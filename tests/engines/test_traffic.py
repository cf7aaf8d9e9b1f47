"""Reduction in bf16 on two real ranks: half the bytes, and how far it rounds.

When, and in how many messages, the ranks exchange what is seen on pretended GPUs (tests/cuda/test_program.py).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.cuda.seen import SMALL, Collective, collective_of, totals
from tests.ranks import run_ranks
from tests.tiny import VOCABULARY
from tests.tiny_engines import BLOCK, make_engine, random_start, tiny_config
from tests.traffic import exchanged, size

ACCUMULATION = 3
# Large enough for several of DDP's buckets, which hold 1 MiB or a block.
SHAPE = {"n_layer": 3, "n_embd": 128, "vocab_size": VOCABULARY + 1}
CASES = ("ddp", "fsdp", "fsdp whole", "zero1", "zero2", "zero3")
# Several buckets of this model; at stage 3 nothing is kept because it is small, or needed again soon.
SMALL_MODEL = {
    "zero_optimization.reduce_bucket_size": 100_000,
    "zero_optimization.stage3_param_persistence_threshold": 0,
    "zero_optimization.stage3_max_reuse_distance": 0,
    "zero_optimization.stage3_prefetch_bucket_size": 0,
}


class Measured(NamedTuple):
    step: list[Collective]  # of the second
    norm: float  # of the first step's gradient
    nll: float  # nats per token, after two steps


class Traffic(TorchDispatchMode):
    """Lists in `seen` what this thread launches of torch's own c10d operations, in which all engines end."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Collective] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "c10d":
            self.seen += collective_of(op, args, on_host=False)
        return op(*args, **(kwargs or {}))


def measure(case: str) -> dict[str, Measured]:
    """On one rank: two steps with each format of the reduction; with bf16 products, too, under DDP."""
    by_dtype = {reduce_dtype: two_steps(case, "fp32", reduce_dtype) for reduce_dtype in ("fp32", "bf16")}
    return by_dtype | ({"bf16 products": two_steps(case, "bf16", "fp32")} if case == "ddp" else {})


def two_steps(case: str, precision: str, reduce_dtype: str) -> Measured:
    from wikift.base.world import start_world
    from wikift.settings import deepspeed as dsconfig

    world = start_world("cpu")
    config = tiny_config(**SHAPE)
    kind, options = case.split()[0], {"reshard": case != "fsdp whole"}
    if kind.startswith("zero"):
        options = {"ds_config": dsconfig.read(kind)[0] | SMALL_MODEL}
    engine: Any = make_engine(
        kind, world, config, accumulation=ACCUMULATION, precision=precision, reduce_dtype=reduce_dtype, **options
    )
    engine.restore(random_start(config))
    data = torch.Generator().manual_seed(world.rank)
    norms = []
    for _ in range(2):  # what is done once only is done in the first
        with Traffic() as traffic:
            for i in range(ACCUMULATION):
                blocks = torch.randint(VOCABULARY, (1, BLOCK + 1), generator=data)
                engine.forward_backward(blocks, last=i == ACCUMULATION - 1)
            norms.append(float(engine.step(1e-3)))
    blocks = torch.randint(VOCABULARY, (4, BLOCK + 1), generator=data)
    nll = world.total(engine.nll(blocks[:, :-1], blocks[:, 1:])) / (world.size * blocks[:, 1:].numel())
    return Measured(traffic.seen, norms[0], float(nll))


@functools.cache
def measured(case: str) -> dict[str, Measured]:
    return run_ranks(measure, 2, case)[0]


@pytest.mark.parametrize("case", CASES)
def test_reduction_in_bf16_halves_the_gradients_bytes(case: str) -> None:
    exact, rounded = measured(case)["fp32"], measured(case)["bf16"]
    model = size(SHAPE["n_layer"], SHAPE["n_embd"], SHAPE["vocab_size"], tiny_config().n_positions)
    assert totals(exact.step) == exchanged(case, model, ACCUMULATION, 4, 4)
    assert totals(rounded.step) == exchanged(case, model, ACCUMULATION, 4, 2)
    gradients = [c for c in rounded.step if c.name in ("all_reduce", "reduce_scatter")]
    assert {c.dtype for c in gradients if c.bytes > SMALL} == {torch.bfloat16}
    # Rounding to 8 bits moves a number by 2^-9 of itself at most: each rank's share, then their sum. Of gradients that
    # don't oppose each other the shares' norms are sqrt(2) times the mean's at most.
    assert 0 < abs(rounded.norm / exact.norm - 1) < 2**-9 * (1 + 2**0.5)
    # products in bf16 round the gradients and all that leads to them
    assert 0 < abs(rounded.nll - exact.nll) < abs(measured("ddp")["bf16 products"].nll - exact.nll)
