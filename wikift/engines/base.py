"""The seam: what training asks of an engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from torch import Tensor

from wikift.checkpoint.fragment import Fragment, FragmentReader


class Engine(Protocol):
    """Places the work. Every method is collective: all ranks call it, in the same order.

    Engines do not log, do not know the step's number and read no files.
    """

    def forward_backward(self, blocks: Tensor, *, last: bool) -> Tensor:
        """Add this micro-batch's share of the gradient; its mean loss, detached.

        `blocks` (micro_batch, block_size + 1) token ids, int64; `last` of the step's micro-batches.
        """
        ...

    def step(self, lr: float) -> Tensor:
        """Clip, update, clear. Returns the global gradient norm before clipping.

        A norm that is not finite leaves weights and moments as they were: the step is skipped, not applied.
        """
        ...

    def nll(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Summed negative log-likelihood (float64 scalar, nats) of this rank's windows, in eval mode, no gradients.

        `inputs`, `targets` (windows, context) int64; targets of -100 are not scored.
        """
        ...

    def next_logits(self, inputs: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Logits (rows, vocabulary) in fp32 of the token that follows on each row, in eval mode, no gradients.

        `inputs`, `mask`, `positions` (rows, length) int64: ids padded on the left, 0 where padded, and position ids.
        All ranks pass the same rows.
        """
        ...

    def fragments(self) -> Iterator[Fragment]:
        """What this rank owns of weights and optimizer state: over all ranks every element exactly once."""
        ...

    def replicas(self) -> Iterable[Tensor]:
        """The weights that every rank has a copy of; none where they are sharded."""
        ...

    def restore(self, reader: FragmentReader) -> None:
        """Take what this rank needs."""
        ...
