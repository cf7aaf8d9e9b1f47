"""The stream of blocks: every one once an epoch, the same for every placement, from any step at once."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, DistributedSampler

from tests.tiny import VOCABULARY, arguments, metrics, tiny_store
from wikift.base.files import sealed, sha256_of
from wikift.commands.train import main
from wikift.data.batches import (
    BatchLayout,
    ResumableSampler,
    ahead,
    block_windows,
    count_blocks,
    micro_batches,
    read_blocks,
    sample_blocks,
)
from wikift.data.store import open_store

BLOCK = 3


def dealt(items: np.ndarray, ranks: int, count: int, *, run_seed: int = 0, start: int = 0) -> list[list[int]]:
    """The first `count` items of every rank."""
    return [
        list(islice(ResumableSampler(items, rank=rank, ranks=ranks, run_seed=run_seed, start=start), count))
        for rank in range(ranks)
    ]


def stream(items: np.ndarray, count: int, *, run_seed: int = 0, start: int = 0) -> list[int]:
    return dealt(items, 1, count, run_seed=run_seed, start=start)[0]


def step_of(rows: int, micro: int, accumulation: int, ranks: int, *, first_step: int, steps: int) -> list[np.ndarray]:
    """Steps of the whole batch, (global batch, BLOCK + 1), its rows by position in the stream."""
    tokens = np.arange(rows * BLOCK + 1, dtype=np.uint16)  # token i is number i: a block shows which one it is
    layouts = [BatchLayout(BLOCK, micro, accumulation, rank, ranks) for rank in range(ranks)]
    of_ranks = [micro_batches(tokens, np.arange(rows), layout, run_seed=7, first_step=first_step) for layout in layouts]
    made = []
    for _ in range(steps):
        batch = np.empty((ranks * micro * accumulation, BLOCK + 1), np.int64)
        for rank, batches in enumerate(of_ranks):
            parts = next(batches)
            assert [(part.shape, part.dtype) for part in parts] == [((micro, BLOCK + 1), torch.int64)] * accumulation
            batch[rank::ranks] = torch.cat(parts).numpy()
        made.append(batch)
    return made


@settings(max_examples=60, deadline=None)
@given(blocks=st.integers(1, 60), ranks=st.integers(1, 7), epochs=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_every_block_once_an_epoch_over_all_ranks(blocks: int, ranks: int, epochs: int, seed: int) -> None:
    items = np.arange(blocks) * 2 + 5  # numbers of a sample, not places in it
    of_ranks = dealt(items, ranks, -(-blocks * epochs // ranks), run_seed=seed)
    in_turn = [item for items_of_turn in zip(*of_ranks, strict=True) for item in items_of_turn]
    for epoch in range(epochs):
        assert sorted(in_turn[epoch * blocks : (epoch + 1) * blocks]) == list(items)


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 40), batch=st.sampled_from([1, 4, 6, 12, 24]), first_step=st.integers(0, 30), data=st.data())
def test_a_step_is_the_same_blocks_in_the_same_places_however_it_is_split(
    rows: int, batch: int, first_step: int, data: st.DataObject
) -> None:
    ranks = data.draw(st.sampled_from([d for d in range(1, batch + 1) if batch % d == 0]))
    micro = data.draw(st.sampled_from([d for d in range(1, batch // ranks + 1) if (batch // ranks) % d == 0]))
    whole = step_of(rows, batch, 1, 1, first_step=first_step, steps=2)
    split = step_of(rows, micro, batch // ranks // micro, ranks, first_step=first_step, steps=2)
    assert all(np.array_equal(a, b) for a, b in zip(whole, split, strict=True))
    later = step_of(rows, batch, 1, 1, first_step=first_step + 1, steps=1)
    assert np.array_equal(whole[1], later[0])


@settings(max_examples=60, deadline=None)
@given(blocks=st.integers(1, 50), ranks=st.integers(1, 5), start=st.integers(0, 200))
def test_starting_at_a_position_is_dropping_what_comes_before(blocks: int, ranks: int, start: int) -> None:
    items = np.arange(blocks)
    start *= ranks
    whole, later = dealt(items, ranks, 30 + start // ranks), dealt(items, ranks, 30, start=start)
    assert [rank[start // ranks :] for rank in whole] == later


def test_a_far_position_costs_one_permutation(monkeypatch: pytest.MonkeyPatch) -> None:
    from wikift.data import batches

    drawn = []
    permutation = batches._permutation
    monkeypatch.setattr(batches, "_permutation", lambda *words: drawn.append(words) or permutation(*words))
    stream(np.arange(100), 50, start=100 * 10**9)
    assert len(drawn) == 1


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    """Positions that two orders share by chance are one on average: a shifted or reversed order has 0 or all."""
    items = np.arange(500)
    orders = {
        (seed, epoch): np.array(stream(items, 500, run_seed=seed, start=500 * epoch))
        for seed in range(6)
        for epoch in range(6)
    }
    shared = [int((a == b).sum()) for a, b in itertools.combinations(orders.values(), 2)]
    assert 0.8 < np.mean(shared) < 1.2
    assert max(shared) < 10  # also seed 1 in epoch 1 and seed 2 in epoch 0
    assert all((order != items).any() for order in orders.values())
    assert orders[1, 1].tolist() == stream(items, 500, run_seed=1, start=500), "drawn again, the same"


@settings(max_examples=100, deadline=None)
@given(blocks=st.integers(1, 500), fraction=st.floats(0.001, 1), seed=st.integers(0, 2**40))
def test_data_fraction_is_a_seeded_sample(blocks: int, fraction: float, seed: int) -> None:
    found = sample_blocks(blocks, fraction, seed)
    assert len(found) == max(1, round(blocks * fraction))
    assert list(found) == sorted(set(found.tolist()))
    assert found[0] >= 0
    assert found[-1] < blocks
    assert found.dtype == np.int64
    assert np.array_equal(found, sample_blocks(blocks, fraction, seed))


def test_other_seeds_take_other_samples_of_all_parts() -> None:
    samples = [frozenset(sample_blocks(1000, 0.1, seed).tolist()) for seed in range(20)]
    assert len(set(samples)) == 20
    taken = np.bincount([block // 100 for sample in samples for block in sample], minlength=10)
    assert taken.min() > 140  # 200 of each tenth on average, with a deviation of 13


@settings(max_examples=100, deadline=None)
@given(tokens=st.integers(2, 400), block=st.integers(1, 50), dtype=st.sampled_from(["<u2", "<u4"]), data=st.data())
def test_blocks_are_slices_and_all_targets_are_in_one(tokens: int, block: int, dtype: str, data: st.DataObject) -> None:
    ids = np.random.default_rng(tokens).integers(0, 60000, tokens).astype(dtype)
    count = count_blocks(tokens, block)
    assert count * block + 1 <= tokens < (count + 1) * block + 1
    if not count:
        return
    numbers = np.array(data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=8)))
    expected = [ids[n * block : n * block + block + 1].astype(np.int64) for n in numbers]
    windows = block_windows(ids, block)
    assert windows.shape == (count, block + 1)
    found = read_blocks(windows, numbers)
    assert found.dtype == torch.int64
    assert np.array_equal(found.numpy(), np.stack(expected))
    every = read_blocks(windows, np.arange(count)).numpy()
    assert np.array_equal(every[:, 1:].ravel(), ids[1 : count * block + 1])  # no target lost or seen twice at a seam


def test_a_mapped_store_is_read_like_an_array_and_stays_as_it_is(tmp_path: Path) -> None:
    ids = open_store(tiny_store(tmp_path / "store")).tokens("train")
    before, numbers = ids.tolist(), np.array([50, 0, 7])
    blocks = read_blocks(block_windows(ids, 8), numbers)
    assert torch.equal(blocks, read_blocks(block_windows(np.array(ids), 8), numbers))
    blocks += 1  # a copy of its own
    assert ids.tolist() == before


@pytest.mark.long
def test_a_store_above_31_bits_is_read_to_its_end(tmp_path: Path) -> None:
    """More than 2**31 tokens, 4 GiB: a sparse file, zeros but for its last block. It trains, too."""
    path, block = tiny_store(tmp_path / "store"), 1024
    record = json.loads((path / "store.json").read_text())
    tokens = record["splits"]["train"]["tokens"] = 2**31 + 3 * block + 1
    last = np.arange(block + 1, dtype="<u2") % VOCABULARY
    with open(path / "train.bin", "wb") as file:
        file.truncate(2 * tokens)
        file.seek(2 * (tokens - len(last)))
        file.write(last.tobytes())
    record["splits"]["train"]["sha256"] = sha256_of(path / "train.bin")
    (path / "store.json").write_text(json.dumps(sealed(record)))
    ids = open_store(path).tokens("train")
    count = count_blocks(len(ids), block)
    assert count == 2**21 + 3
    ((micro_batch,),) = islice(micro_batches(ids, np.array([count - 1]), BatchLayout(block, 1), run_seed=0), 1)
    assert micro_batch.tolist() == [last.tolist()]
    line = {"block_size": block, "config_overrides": "n_layer=1,n_head=1,n_embd=8,n_positions=1024", "max_steps": 2}
    assert main(arguments(path, tmp_path / "run", **line)) == 0
    assert [row["tokens"] for row in metrics(tmp_path / "run")] == [8 * block, 16 * block]


def test_it_is_a_distributed_sampler_that_a_loader_takes() -> None:
    sampler = ResumableSampler(np.arange(10), rank=1, ranks=2, run_seed=0)
    assert isinstance(sampler, DistributedSampler)
    assert (sampler.rank, sampler.num_replicas) == (1, 2)
    loader = DataLoader(list(range(10)), batch_size=2, sampler=sampler)  # type: ignore[arg-type]
    batches = [batch.tolist() for batch in islice(loader, 5)]
    expected = stream(np.arange(10), 20)[1::2]
    assert [item for batch in batches for item in batch] == expected


# --- ahead -------------------------------------------------------------------------------------------------------


def of_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_batches_made_ahead_are_the_same_and_their_number_is_bounded() -> None:
    made = 0

    def counted() -> Iterator[list[torch.Tensor]]:
        nonlocal made
        for number in range(50):
            made += 1
            yield [torch.tensor([number]), torch.tensor([-number])]

    found = []
    for blocks in ahead(counted(), torch.device("cpu"), steps=3):
        found.append([int(block) for block in blocks])
        time.sleep(0.002)  # for the thread to run on
        assert made <= len(found) + 3
    assert found == [[number, -number] for number in range(50)]
    assert not of_threads()


def test_an_error_of_the_data_is_raised_in_its_turn() -> None:
    def failing() -> Iterator[list[torch.Tensor]]:
        yield [torch.tensor([1])]
        yield [torch.tensor([2])]
        raise OSError(5, "Input/output error")

    batches = ahead(failing(), torch.device("cpu"))
    assert [int(next(batches)[0]), int(next(batches)[0])] == [1, 2]
    with pytest.raises(OSError, match="Input/output"):
        next(batches)
    assert not of_threads()


def test_the_thread_ends_with_its_iterator() -> None:
    batches = ahead(itertools.repeat([torch.zeros(1)]), torch.device("cpu"))
    next(batches)
    assert of_threads()
    del batches
    assert not of_threads()
