"""Gradients averaged in the memory of one host: the same means as over gloo, in pieces, and where it cannot be.

pytest tests/test_shared.py
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.tiny import VOCABULARY
from tests.tiny_engines import BLOCK, make_engine, random_start, tiny_config
from wikift.base.world import start_world

SIZES = (1, 30, 7, 64, 5)


def given(rank: int) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(rank)
    return [torch.randn(size, generator=random) for size in SIZES]


def averaged(room: int, piece: int) -> list[list[float]]:
    """Twice, so that what the first left is written over."""
    from wikift.engines import shared

    shared._ROOM, shared._PIECE = room, piece
    world = start_world("cpu")
    memory = shared.share_memory(world, sum(SIZES))
    assert memory is not None
    for _ in range(2):
        buffers = given(world.rank)
        shared.average(buffers, memory)
    return [buffer.tolist() for buffer in buffers]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(("room", "piece"), [(1000, 1000), (1000, 4), (16, 5), (1, 1)])
def test_means_are_sums_in_the_order_of_the_ranks(ranks: int, room: int, piece: int) -> None:
    shares = [[part * (1 / ranks) for part in given(rank)] for rank in range(ranks)]
    expected = [sum(parts[1:], start=parts[0]).tolist() for parts in zip(*shares, strict=True)]
    assert run_ranks(averaged, ranks, room, piece) == [expected] * ranks


def steps(local_size: int) -> tuple[list[float], list[list[float]]]:
    """Losses and norms of three steps of two micro-batches, and the weights after them."""
    from wikift.engines import ddp

    found: list[bool] = []
    share = ddp.share_memory

    def noted(*arguments: Any) -> Any:
        memory = share(*arguments)
        found.append(memory is not None)
        return memory

    ddp.share_memory = noted
    world = dataclasses.replace(start_world("cpu"), local_size=local_size)
    config = tiny_config(0.1)
    engine: Any = make_engine("ddp", world, config, accumulation=2)
    engine.restore(random_start(config))
    data, numbers = torch.Generator().manual_seed(world.rank), []
    torch.manual_seed(world.rank)
    for _ in range(3):
        for last in (False, True):
            blocks = torch.randint(VOCABULARY, (1, BLOCK + 1), generator=data)
            numbers.append(float(engine.forward_backward(blocks, last=last)))
        numbers.append(float(engine.step(1e-2)))
    assert found == [local_size == world.size]
    return numbers, [p.detach().flatten().tolist() for p in engine.local.model.parameters()]


def test_two_ranks_train_bit_for_bit_as_over_gloo() -> None:
    assert run_ranks(steps, 2, 2) == run_ranks(steps, 2, 1)


def refused(fault: str) -> list[bool]:
    """Whether memory was shared: with one rank's fault, and then without."""
    from wikift.engines.shared import share_memory

    world, made, opened = start_world("cpu"), os.memfd_create, os.open

    def fail(*arguments: Any, **more: Any) -> int:
        raise PermissionError(13, "not here")

    def open_own(path: str, *arguments: Any) -> int:
        """As in a container where this rank's process has the number that another has in its own."""
        return opened(f"/proc/{os.getpid()}/fd/{path.rsplit('/', 1)[1]}", *arguments)

    found = []
    for faulty in (world.rank == 1, False):
        os.memfd_create = fail if faulty and fault == "making" else made
        os.open = {"opening": fail, "another's": open_own}.get(fault, opened) if faulty else opened
        found.append(share_memory(world, 100) is not None)
    return found


@pytest.mark.parametrize("fault", ["making", "opening", "another's"])
def test_one_rank_that_cannot_share_keeps_all_from_it(fault: str) -> None:
    assert run_ranks(refused, 3, fault) == [[False, True]] * 3
