"""What a pretended GPU saw: waits of the host, collectives, launches and bytes, in parts."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

SMALL = 64  # bytes; norms, flags and losses lie below it, gradients and weights above
_COLLECTIVES = (("reduce_scatter", "reduce_scatter"), ("allreduce", "all_reduce"), ("allgather", "all_gather"))


class Collective(NamedTuple):
    name: str  # all_reduce, all_gather, reduce_scatter, or torch's own name of another one
    bytes: int  # of the whole: what is reduced, or what has been gathered
    dtype: torch.dtype
    on_host: bool
    early: bool = False  # launched before the last gradient of the backward pass was made


@dataclass
class Part:
    """What was seen while `name` went on."""

    name: str
    waits: Counter[tuple[str, str]] = field(default_factory=Counter)  # (what was waited for, the line that asked)
    collectives: list[Collective] = field(default_factory=list)
    launches: int = 0
    most: int = 0  # bytes held at once

    def totals(self) -> dict[str, int]:
        return totals(self.collectives)


@dataclass
class Seen:
    """All that was seen, in parts that `begin` separates."""

    parts: list[Part] = field(default_factory=lambda: [Part("start")])
    now: int = 0  # bytes held

    def begin(self, name: str) -> None:
        self.parts.append(Part(name, most=self.now))

    @property
    def part(self) -> Part:
        return self.parts[-1]

    def wait(self, what: str) -> None:
        self.part.waits[what, _line()] += 1


def totals(collectives: list[Collective]) -> dict[str, int]:
    """Bytes of weights and gradients by the kind of collective."""
    sums: Counter[str] = Counter()
    for collective in collectives:
        if collective.bytes > SMALL and not collective.on_host:
            sums[collective.name] += collective.bytes
    return dict(sums)


def collective_of(op: Any, args: Any, on_host: bool) -> list[Collective]:
    """What an operation of c10d exchanges; nothing where it has no tensors, as a barrier."""
    largest = max(([t for t in tree_leaves(arg) if isinstance(t, Tensor)] for arg in args), key=_bytes)
    name = op._schema.name.removeprefix("c10d::").strip("_")
    name = next((known for part, known in _COLLECTIVES if part in name), name)
    return [Collective(name, _bytes(largest), largest[0].dtype, on_host)] if largest else []


def _line() -> str:
    """The innermost line of wikift, and of DeepSpeed where that asked."""
    own = inner = ""
    frame = sys._getframe(1)
    while frame is not None and not own:
        path = frame.f_code.co_filename
        if "/deepspeed/" in path and not inner:
            inner = f" < deepspeed/{path.split('/deepspeed/')[-1]}:{frame.f_lineno}"
        if "/wikift/" in path and "/tests/" not in path:
            own = f"wikift/{path.split('/wikift/')[-1]}:{frame.f_lineno}"
        frame = frame.f_back
    return (own or "the backward pass") + inner


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
