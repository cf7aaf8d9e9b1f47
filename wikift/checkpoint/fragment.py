"""The form in which every engine's state is saved and restored: contiguous ranges of flattened tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:  # who only moves bytes does not wait a second and a half for torch
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
        """Elements [start, stop) of the flattened whole: 1-D, fp32, on the CPU or the engine's device."""
        ...


@dataclass(frozen=True)
class FreshStart:
    """A FragmentReader of weights with an optimizer that has not made a step yet."""

    weight: Callable[[str, int, int], Tensor]  # (name, start, stop) -> elements of the flattened whole, fp32

    def read(self, name: str, state: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop): weights, and zeros for all else (a loss scale of 0 is one not set yet)."""
        import torch

        return self.weight(name, start, stop) if state == "weight" else torch.zeros(stop - start)
