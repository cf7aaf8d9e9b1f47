"""The seam: what training needs of an engine, and the form in which every engine's state is saved."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from torch import Tensor

# The states of a parameter. Adam's step count and the loss scale are numbers of the whole optimizer: see SCALARS.
MOMENTS = ("exp_avg", "exp_avg_sq")
STATES = ("weight", *MOMENTS)
# Numbers that an engine saves beside its parameters, each a fragment of one element under the name OPTIMIZER.
OPTIMIZER = "optimizer"
SCALARS = ("updates", "loss_scale", "steps_since_overflow", "overflows")


class Fragment(NamedTuple):
    """A contiguous range of one flattened parameter or moment that this rank owns."""

    name: str  # the parameter's Hugging Face name, or OPTIMIZER
    state: str  # one of STATES, or of SCALARS
    start: int  # first element, in the flattened whole
    shape: tuple[int, ...]  # of the whole
    data: Tensor  # 1-D, fp32, on any device


class FragmentReader(Protocol):
    """Where an engine takes its state from; a checkpoint is one."""

    def read(self, name: str, state: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened whole: 1-D, fp32, on the CPU."""
        ...


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
        """Clip, update, clear. Gives the global gradient norm before clipping.

        A norm that is not finite leaves weights and moments as they were: the step is skipped, not applied.
        """
        ...

    def nll(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Summed negative log-likelihood (float64 scalar, nats) of this rank's windows, in eval mode, no gradients.

        `inputs`, `targets` (windows, context) int64; targets of -100 are not scored.
        """
        ...

    def next_logits(self, inputs: Tensor, mask: Tensor, places: Tensor) -> Tensor:
        """Logits (rows, vocabulary) in fp32 of the token that follows on each row, in eval mode, no gradients.

        `inputs`, `mask`, `places` (rows, length) int64: ids padded on the left, 0 where padded, and positions. All
        ranks give the same rows.
        """
        ...

    def fragments(self) -> Iterator[Fragment]:
        """What this rank owns of weights and optimizer state: over all ranks every element exactly once."""
        ...

    def restore(self, reader: FragmentReader) -> None:
        """Take what this rank needs."""
        ...
