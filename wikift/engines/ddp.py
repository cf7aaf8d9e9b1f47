"""torch's DistributedDataParallel: whole weights on every rank, gradients averaged in the step's last backward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from wikift.base.world import World
from wikift.checkpoint.fragment import Fragment, FragmentReader
from wikift.engines.single import SingleEngine, whole_fragments
from wikift.model.gpt2 import DTYPES


class DDPEngine:
    """A SingleEngine whose loss is wrapped in DDP; see Engine for the methods."""

    def __init__(self, local: SingleEngine, world: World) -> None:
        self.local, self.world = local, world
        self.step, self.nll, self.next_logits, self.replicas = local.step, local.nll, local.next_logits, local.replicas
        self.unwrapped = local.losses
        local.thin_embedding_gradient(False)  # DDP would take the sum with the head's gradient for sparse too
        # a bucket for each block: beside the last one, the embeddings', nothing is left to compute
        block = sum(4 * parameter.numel() for parameter in local.model.transformer.h[0].parameters())
        self.ddp = DistributedDataParallel(self.unwrapped, gradient_as_bucket_view=True, bucket_cap_mb=block >> 20 or 1)
        local.thin_embedding_gradient()
        if (reduce_dtype := local.work.reduce_dtype) != "fp32":
            # DDP wants the annotations of a hook to be no strings; a lambda has none
            self.ddp.register_comm_hook(DTYPES[reduce_dtype], lambda dtype, bucket: _mean_in(dtype, bucket))
        self._settle_buckets(local.work.block_size)

    def _settle_buckets(self, block_size: int) -> None:
        """Let DDP lay out its buckets before the first step that counts.

        DDP regroups its buckets after the first backward, by the order in which gradients came. From three ranks on,
        a gradient's position in its bucket decides the order in which ranks are added, so the first step of a resumed
        run would round differently from the same step of an uninterrupted one. One backward before it makes
        every real step use the final layout. Not compiled: it would be for this one row only.
        """
        blocks = torch.zeros(1, block_size + 1, dtype=torch.int64)
        with torch.compiler.set_stance("force_eager"):
            for _ in range(2):  # the second forward rebuilds the buckets
                self.forward_backward(blocks, last=True)
        self.local.optimizer.zero_grad(set_to_none=True)

    def forward_backward(self, blocks: Tensor, *, last: bool) -> Tensor:
        # DDP decides in the forward whether the backward will communicate
        with contextlib.nullcontext() if last else self.ddp.no_sync():
            self.local.losses = self.ddp
            try:
                return self.local.forward_backward(blocks, last=last)
            finally:
                self.local.losses = self.unwrapped

    def fragments(self) -> Iterator[Fragment]:
        return whole_fragments(self.local, self.world.rank, self.world.size)

    def restore(self, reader: FragmentReader) -> None:
        self.local.restore(_ReadOnce(reader, self.world))


class _ReadOnce:
    """A FragmentReader of which each range is read by one rank, in turn, and sent to the others; collective."""

    def __init__(self, reader: FragmentReader, world: World) -> None:
        self.reader, self.world, self.count = reader, world, 0

    def read(self, name: str, state: str, start: int, stop: int) -> Tensor:
        source = self.count % self.world.size
        self.count += 1
        values = self.reader.read(name, state, start, stop) if source == self.world.rank else torch.empty(stop - start)
        values = values.to(self.world.device)
        dist.broadcast(values, source)
        return values


def _mean_in(dtype: torch.dtype, bucket: Any) -> torch.futures.Future[Tensor]:
    """A bucket's mean over the ranks, exchanged in `dtype`; torch's bf16_compress_hook, which it refuses on gloo."""
    low = bucket.buffer().to(dtype).div_(dist.get_world_size())
    exchanged = dist.all_reduce(low, async_op=True).get_future()
    mean: torch.futures.Future[Tensor] = exchanged.then(lambda _: bucket.buffer().copy_(low))
    return mean
