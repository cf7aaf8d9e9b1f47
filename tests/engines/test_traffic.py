"""What the ranks exchange: how much, when, in which format; counted on two real ranks."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks.scaling_paper import exchanged, size
from tests.ranks import run_ranks
from tests.tiny import VOCABULARY, arguments, tiny_store
from tests.tiny_engines import BLOCK, make_engine, random_start, tiny_config
from tests.traffic import SMALL, Collective, Traffic, totals

ROOT = Path(__file__).resolve().parents[2]
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

Step = list[list[Collective]]  # of each micro-batch, and of the update


class Measured(NamedTuple):
    step: Step  # the second
    norm: float  # of the first step's gradient
    nll: float  # nats per token, after two steps


def measure(case: str) -> dict[str, Measured]:
    """On one rank: two steps with each format of the reduction; with bf16 products, too, under DDP."""
    found = {reduce_dtype: two_steps(case, "fp32", reduce_dtype) for reduce_dtype in ("fp32", "bf16")}
    return found | ({"bf16 products": two_steps(case, "bf16", "fp32")} if case == "ddp" else {})


def two_steps(case: str, precision: str, reduce_dtype: str) -> Measured:
    from wikift.base.world import start_world
    from wikift.settings import deepspeed as dsconfig

    world = start_world("cpu")
    config = tiny_config(**SHAPE)
    kind, options = case.split()[0], {"reshard": case != "fsdp whole"}
    if kind.startswith("zero"):
        options = {"ds_config": dsconfig.read(kind)[0] | (SMALL_MODEL if case == kind else {})}
    engine: Any = make_engine(
        kind, world, config, accumulation=ACCUMULATION, precision=precision, reduce_dtype=reduce_dtype, **options
    )
    engine.restore(random_start(config))
    data = torch.Generator().manual_seed(world.rank)
    norms = []
    for _ in range(2):  # what is done once only is done in the first
        step: Step = []
        for i in range(ACCUMULATION):
            blocks = torch.randint(VOCABULARY, (1, BLOCK + 1), generator=data)
            with Traffic() as traffic:
                engine.forward_backward(blocks, last=i == ACCUMULATION - 1)
            step.append(traffic.found)
        with Traffic() as traffic:
            norms.append(float(engine.step(1e-3)))
        step.append(traffic.found)
    blocks = torch.randint(VOCABULARY, (4, BLOCK + 1), generator=data)
    nll = world.total(engine.nll(blocks[:, :-1], blocks[:, 1:])) / (world.size * blocks[:, 1:].numel())
    return Measured(step, norms[0], float(nll))


@functools.cache
def measured(case: str) -> dict[str, Measured]:
    return run_ranks(measure, 2, case)[0]


def expected(case: str, gradient: int = 4) -> dict[str, int]:
    config = tiny_config(**SHAPE)
    model = size(config.n_layer, config.n_embd, config.vocab_size, config.n_positions)
    return exchanged(case, model, ACCUMULATION, 4, gradient)


@pytest.mark.parametrize("case", CASES)
def test_volumes_are_those_of_the_forecast(case: str) -> None:
    step = measured(case)["fp32"].step
    assert totals([collective for part in step for collective in part]) == expected(case)
    others = [c for part in step for c in part if c.bytes <= SMALL]
    assert len(others) <= 2, "the norm, and ZeRO's overflow"


def test_zero3s_file_gathers_and_reduces_in_few_messages() -> None:
    """As it comes: small weights come with their block, none by itself after the update."""
    *micro_batches, update = measured("zero3 as it comes")["fp32"].step
    assert {c.name for c in update} == {"all_reduce"}
    for found in micro_batches:
        assert len(found) <= 6, "forward and backward, for 40 weights"


@pytest.mark.parametrize("case", ["ddp", "zero1", "fsdp whole"])
def test_inner_micro_batches_exchange_nothing(case: str) -> None:
    first, *inner = measured(case)["fp32"].step[: ACCUMULATION - 1]
    assert inner == [[]]
    if case == "fsdp whole":  # the step's weights come in its first forward, no gradient goes
        assert {c.name for c in first} == {"all_gather"}
    else:
        assert not first


@pytest.mark.parametrize("case", CASES)
def test_gradients_travel_while_others_are_still_made(case: str) -> None:
    last = measured(case)["fp32"].step[ACCUMULATION - 1]
    gradients = [c for c in last if c.name in ("all_reduce", "reduce_scatter")]
    assert gradients[0].early
    assert not gradients[-1].early, "the embedding's gradient is the last"


def reduced(layers: int, width: int) -> list[Collective]:
    """What DDP sends in a backward of one micro-batch."""
    from wikift.base.world import start_world

    config = tiny_config(n_layer=layers, n_embd=width)
    engine = make_engine("ddp", start_world("cpu"), config)
    engine.restore(random_start(config))
    with Traffic() as traffic:
        engine.forward_backward(torch.zeros(1, BLOCK + 1, dtype=torch.int64), last=True)
    return traffic.found


def test_the_last_of_ddps_buckets_is_the_embeddings() -> None:
    """Its time is exposed: nothing is left to compute. With it goes the LayerNorm before, which begins a bucket."""
    layers, width = 3, 320
    *buckets, last = run_ranks(reduced, 2, layers, width)[0]
    config = tiny_config()
    assert len(buckets) == layers
    assert last.bytes == 4 * width * (config.vocab_size + config.n_positions + 2)


@pytest.mark.parametrize("case", CASES)
def test_reduction_in_bf16_halves_the_gradients_bytes(case: str) -> None:
    exact, rounded = measured(case)["fp32"], measured(case)["bf16"]
    gradients = [c for part in rounded.step for c in part if c.name in ("all_reduce", "reduce_scatter")]
    assert {c.dtype for c in gradients if c.bytes > SMALL} == {torch.bfloat16}
    assert totals([collective for part in rounded.step for collective in part]) == expected(case, gradient=2)
    # Rounding to 8 bits moves a number by 2^-9 of itself at most: each rank's share, then their sum. Of gradients that
    # don't oppose each other the shares' norms are sqrt(2) times the mean's at most.
    assert 0 < abs(rounded.norm / exact.norm - 1) < 2**-9 * (1 + 2**0.5)
    # products in bf16 round the gradients and all that leads to them
    assert 0 < abs(rounded.nll - exact.nll) < abs(measured("ddp")["bf16 products"].nll - exact.nll)


def train(line: list[str]) -> list[Collective]:
    from wikift.commands.train import main

    with Traffic() as traffic:
        assert main(line) == 0
    return traffic.found


@pytest.mark.parametrize("logging_steps", [1, 100])
def test_a_step_has_one_collective_for_its_numbers(tmp_path: Path, logging_steps: int) -> None:
    """Loss, and whether to stop: a run of four steps more has four more of them, logged or not.

    The others of the four steps are DDP's, of the one bucket that this model's gradients fill.
    """
    store = tiny_store(tmp_path / "store", validation=0)
    counts = []
    for steps in (4, 8):
        line = arguments(
            store,
            tmp_path / f"run{steps}",
            max_steps=steps,
            save_steps=100,
            eval_steps=None,
            logging_steps=logging_steps,
            no_async_save=True,
        )
        counts.append(Counter((c.name, c.bytes > SMALL) for c in run_ranks(train, 2, line)[0]))
    assert counts[1] - counts[0] == {("all_reduce", False): 4, ("all_reduce", True): 4}
