"""What the ranks exchange in a step under each engine, by the formula of docs/explanation/scaling.md."""

from __future__ import annotations

from typing import NamedTuple


class Size(NamedTuple):
    """A model as far as traffic goes, in elements."""

    blocks: int  # the transformer's blocks together
    layers: int
    head: int  # the tied embedding
    rest: int  # positions and the last LayerNorm


def size(layers: int, width: int, vocabulary: int, positions: int) -> Size:
    """GPT-2's."""
    return Size(layers * (12 * width**2 + 13 * width), layers, vocabulary * width, positions * width + 2 * width)


def exchanged(engine: str, model: Size, accumulation: int, weight: int = 4, gradient: int = 4) -> dict[str, int]:
    """Bytes of a step by the kind of collective: the whole that is reduced or gathered, whatever the number of ranks.

    `weight` bytes of an element where weights are gathered, `gradient` where gradients are reduced.
    """
    outside = model.head + model.rest
    every = model.blocks + outside
    if engine == "ddp":
        return {"all_reduce": gradient * every}
    if engine == "zero1":
        return {"all_reduce": gradient * every, "all_gather": weight * every}
    if engine == "zero2":
        return {"all_reduce": accumulation * gradient * every, "all_gather": weight * every}
    if engine == "fsdp whole":  # --no-fsdp-reshard
        return {"all_gather": weight * every, "reduce_scatter": gradient * every}
    reduced = {"reduce_scatter": accumulation * gradient * every}
    if engine == "fsdp":  # the last block, and what lies outside of the blocks, stays from forward to backward
        kept = outside - model.blocks // model.layers
        return {"all_gather": accumulation * weight * (2 * model.blocks + kept), **reduced}
    assert engine == "zero3"  # the tied matrix is gathered for the embedding and for the head
    return {"all_gather": accumulation * weight * 2 * (every + model.head), **reduced}
