"""Ranks of one host that compute on its processor average their gradients in shared memory instead of over gloo.

Gloo sends them through the loopback device, where the kernel copies every byte twice: with two ranks a tenth of a step
(docs/scaling.md). Here each rank puts its gradients where the others see them, adds up its part of all, and reads the
other parts. Ranks are added in their order, so the sum does not depend on where a gradient lies.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from wikift.base.world import World

_ROOM = 1 << 24  # elements that are exchanged at once: 64 MiB of each rank
_PIECE = 1 << 16  # elements that are added at once, which stay in a cache


@dataclass(frozen=True)
class Shared:
    """Memory that all ranks see, by rank, in fp32: what each gives the others, and the sums of its own part."""

    rank: int  # this one
    room: int
    given: tuple[Tensor, ...]  # (room,)
    sums: tuple[Tensor, ...]  # (room / ranks, rounded up)


def share_memory(world: World, elements: int) -> Shared | None:
    """Memory for gradients of `elements` in all; None where ranks are elsewhere or cannot see each other's; collective.

    The memory has no name that a killed process could leave behind, and needs no room in /dev/shm, which is small in
    containers: ranks find it among each other's open files.
    """
    if world.device.type != "cpu" or world.size == 1 or world.local_size != world.size:
        return None
    room = max(1, min(elements, _ROOM))
    size = room + -(-room // world.size)
    mark = os.urandom(8)
    own = _anonymous_file(4 * size, mark)
    places: list[Place | None] = [None] * world.size
    dist.all_gather_object(places, None if own is None else Place(os.getpid(), own, mark))
    opened = [region for place in places if (region := _opened(place, size)) is not None]
    missing = world.highest(int(len(opened) < world.size))
    if own is not None:
        os.close(own)  # all have opened it that could
    if missing:
        return None
    return Shared(world.rank, room, tuple(r[:room] for r in opened), tuple(r[room:] for r in opened))


class Place(NamedTuple):
    """Where a rank's memory is found."""

    process: int
    file: int
    mark: bytes  # what it begins with: among containers the same numbers may name another's memory


def _anonymous_file(size: int, mark: bytes) -> int | None:
    try:
        file = os.memfd_create("wikift-gradients")
        os.ftruncate(file, size)
        os.pwrite(file, mark, 0)
        return file
    except (OSError, AttributeError):  # AttributeError: not Linux
        return None


def _opened(place: Place | None, size: int) -> Tensor | None:
    if place is None:
        return None
    try:
        file = os.open(f"/proc/{place.process}/fd/{place.file}", os.O_RDWR)
        try:
            if os.pread(file, len(place.mark), 0) != place.mark:
                return None
            return torch.frombuffer(mmap.mmap(file, 4 * size), dtype=torch.float32)
        finally:
            os.close(file)
    except (OSError, ValueError):
        return None


def average(buffers: Iterable[Tensor], shared: Shared) -> None:
    """Replace each of `buffers` (1-D, fp32, the same sizes on every rank) by its mean over the ranks; collective.

    A rank writes what it gives while others still read its sums, and its sums while nobody reads: two waits do.
    """
    ranks, rank = len(shared.given), shared.rank
    for parts, used in _rounds(buffers, shared.room):
        bounds = [used * place // ranks for place in range(ranks + 1)]
        others = [place for place in range(ranks) if place != rank]
        for other in others:
            for start, part in _between(parts, bounds[other], bounds[other + 1]):
                torch.mul(part, 1 / ranks, out=shared.given[rank][start : start + len(part)])
        dist.barrier()
        for start, part in _between(parts, bounds[rank], bounds[rank + 1]):
            _add(shared, start, part, shared.sums[rank][start - bounds[rank] :][: len(part)])
        dist.barrier()
        for other in others:
            for start, part in _between(parts, bounds[other], bounds[other + 1]):
                part.copy_(shared.sums[other][start - bounds[other] :][: len(part)])


Parts = Sequence[tuple[int, Tensor]]  # where each begins among all, and the part


def _rounds(buffers: Iterable[Tensor], room: int) -> Iterator[tuple[Parts, int]]:
    """`buffers` in rounds of at most `room` elements, and how many they are."""
    parts: list[tuple[int, Tensor]] = []
    used = 0
    for buffer in buffers:
        while len(buffer):
            part, buffer = buffer[: room - used], buffer[room - used :]
            parts.append((used, part))
            used += len(part)
            if used == room:
                yield parts, used
                parts, used = [], 0
    if parts:
        yield parts, used


def _between(parts: Parts, low: int, high: int) -> Iterator[tuple[int, Tensor]]:
    for start, part in parts:
        first, last = max(start, low), min(start + len(part), high)
        if first < last:
            yield first, part[first - start : last - start]


def _add(shared: Shared, start: int, part: Tensor, sums: Tensor) -> None:
    """Write the mean of `part`, which begins at `start`, to it and to `sums`."""
    ranks = len(shared.given)
    for first in range(0, len(part), _PIECE):
        own = part[first : first + _PIECE]
        here = slice(start + first, start + first + len(own))
        shares = [own * (1 / ranks) if rank == shared.rank else given[here] for rank, given in enumerate(shared.given)]
        total = shares[0] + shares[1]
        for share in shares[2:]:
            total += share
        own.copy_(total)
        sums[first : first + len(own)] = total
