"""Token store -> the blocks of step s for rank r, as a pure function of (seed, step, rank).

The blocks of a split lie end to end in the tokens. An endless stream runs through all of them once an epoch, in an
order drawn from (seed, epoch); step s takes positions [s * G, (s + 1) * G) of the stream, G the global batch, and the
ranks take them in turn. Nothing is remembered between steps, so a resume starts at any position at the cost of one
permutation. A step that crosses an epoch's end continues in the next, so no block is dropped or seen twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from wikift.base.world import seed


def count_blocks(tokens: int, block_size: int) -> int:
    """Whole blocks in a split: each predicts `block_size` tokens, and the token before the first is its context."""
    return max(0, (tokens - 1) // block_size)


def sample_blocks(blocks: int, fraction: float, run_seed: int) -> np.ndarray:
    """The numbers of the blocks to train on: a seeded random sample of at least one, in ascending order; int64."""
    if fraction >= 1:
        return np.arange(blocks)
    kept = max(1, round(blocks * fraction))
    return np.sort(_permutation(blocks, seed(run_seed, "data fraction"))[:kept])


class ResumableSampler(DistributedSampler[int]):
    """torch's DistributedSampler made endless, and able to start at any position of the stream.

    Rank r of R yields the items at positions start + r, start + r + R, ... Unlike its parent it pads nothing: an epoch
    is every one of `items` exactly once over all ranks, and the next epoch follows at once.
    """

    def __init__(self, items: np.ndarray, *, rank: int, ranks: int, run_seed: int, start: int = 0) -> None:
        super().__init__(items, num_replicas=ranks, rank=rank, shuffle=True, drop_last=False)  # type: ignore[arg-type]
        assert len(items) > 0
        self.items = items
        self.run_seed = run_seed
        self.start = start

    def __iter__(self) -> Iterator[int]:
        position, drawn, order = self.start + self.rank, -1, self.items
        while True:
            epoch, index = divmod(position, len(self.items))
            if epoch != drawn:
                drawn, order = epoch, self.items[_permutation(len(self.items), seed(self.run_seed, "order", epoch))]
            yield int(order[index])
            position += self.num_replicas


@dataclass(frozen=True)
class BatchLayout:
    """How the stream is divided: `micro_batch` blocks, `accumulation` times in each step of each rank."""

    block_size: int
    micro_batch: int
    accumulation: int = 1
    rank: int = 0
    ranks: int = 1


def micro_batches(
    tokens: np.ndarray, items: np.ndarray, layout: BatchLayout, *, run_seed: int, first_step: int = 0
) -> Iterator[list[Tensor]]:
    """This rank's micro-batches, each (micro_batch, block_size + 1) int64, of every step from `first_step` on."""
    share, ranks = layout.micro_batch * layout.accumulation, layout.ranks
    start = first_step * share * ranks
    stream = iter(ResumableSampler(items, rank=layout.rank, ranks=ranks, run_seed=run_seed, start=start))
    windows = block_windows(tokens, layout.block_size)
    while True:
        blocks = read_blocks(windows, np.fromiter(islice(stream, share), np.int64, share))
        yield list(blocks.split(layout.micro_batch))


def ahead(stream: Iterator[list[Tensor]], device: torch.device, *, steps: int = 2) -> Iterator[list[Tensor]]:
    """The same micro-batches on `device`, the next `steps` of them prepared by a thread while the device works.

    On CUDA they are in pinned memory and copied without waiting. What `stream` raises is raised here, in its turn.
    The thread ends when this iterator is closed or dropped.
    """

    def prepare() -> list[Tensor] | None:
        blocks = next(stream, None)
        return [block.pin_memory() for block in blocks] if blocks and device.type == "cuda" else blocks

    pool = ThreadPoolExecutor(1, "batches")
    try:
        ready = deque(pool.submit(prepare) for _ in range(steps))
        while (blocks := ready.popleft().result()) is not None:
            ready.append(pool.submit(prepare))
            yield [block.to(device, non_blocking=True) for block in blocks]
    finally:
        pool.shutdown(cancel_futures=True)


def block_windows(tokens: np.ndarray, block_size: int) -> np.ndarray:
    """A view of all blocks, (count_blocks, block_size + 1), each with the token before its first prediction."""
    return np.lib.stride_tricks.sliding_window_view(np.asarray(tokens), block_size + 1)[::block_size]


def read_blocks(windows: np.ndarray, numbers: np.ndarray) -> Tensor:
    """Rows `numbers` of `block_windows`, int64. Making the view takes as long as reading 50 blocks, so it is kept."""
    return torch.from_numpy(windows[numbers].astype(np.int64))


def _permutation(count: int, number: int) -> np.ndarray:
    return torch.randperm(count, generator=torch.Generator().manual_seed(number)).numpy()
