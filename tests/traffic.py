"""What a rank exchanges with the others, counted where every collective passes: torch's own c10d operations.

torch.distributed's functions, DDP's reducer, FSDP2 and DeepSpeed all end in these, on real ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# The last gradient of a backward pass is the embedding's: the model begins with it.
_LAST_GRADIENT = torch.ops.aten.embedding_dense_backward.default
_NAMES = (("reduce_scatter", "reduce_scatter"), ("allreduce", "all_reduce"), ("allgather", "all_gather"))
SMALL = 96  # bytes; norms, flags and losses lie below it, gradients and weights above


class Collective(NamedTuple):
    name: str  # all_reduce, all_gather, reduce_scatter, or torch's own name of another one
    bytes: int  # of the whole: what is reduced, or what has been gathered
    dtype: torch.dtype
    early: bool  # launched before the last gradient of the backward pass was made


class Traffic(TorchDispatchMode):
    """`with Traffic() as traffic:` counts into `traffic.found` what this thread launches."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Collective] = []
        self._operations = 0
        self._at: list[int] = []
        self._last_gradient = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self._operations += 1
        if func is _LAST_GRADIENT:
            self._last_gradient = self._operations
        if func.namespace == "c10d":
            tensors = max(([t for t in tree_leaves(arg) if isinstance(t, Tensor)] for arg in args), key=_bytes)
            name = str(func).removeprefix("c10d.").split(".")[0].strip("_")
            name = next((known for part, known in _NAMES if part in name), name)
            self.found.append(Collective(name, _bytes(tensors), tensors[0].dtype, False))
            self._at.append(self._operations)
        return func(*args, **(kwargs or {}))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.found = [c._replace(early=at < self._last_gradient) for c, at in zip(self.found, self._at, strict=True)]


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def totals(found: Sequence[Collective]) -> dict[str, int]:
    """Bytes of weights and gradients by the kind of collective."""
    sums: dict[str, int] = {}
    for collective in found:
        if collective.bytes > SMALL:
            sums[collective.name] = sums.get(collective.name, 0) + collective.bytes
    return sums
