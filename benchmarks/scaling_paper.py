"""What the ranks exchange under each engine, and the efficiency to expect of 8, 64 and 512 GPUs: on paper.

    python -m benchmarks.scaling_paper [--run gpt2=0.140 ...] [--gpus 8 64 512] [--node-gb-per-s 400] ...

The volumes are counted on real ranks by tests/engines/test_traffic.py. Everything about the machine is an argument,
nothing is measured here; the formula and its assumptions are in docs/explanation/scaling.md.
"""

from __future__ import annotations

import argparse
import math
from typing import NamedTuple

from benchmarks.harness import Figures, write

ENGINES = ("ddp", "fsdp", "fsdp whole", "zero1", "zero2", "zero3")  # "whole": --no-fsdp-reshard


# --- what is exchanged -------------------------------------------------------------------------------------------


class Size(NamedTuple):
    """A model as far as traffic goes, in elements."""

    blocks: int  # the transformer's blocks together
    layers: int
    head: int  # the tied embedding
    rest: int  # positions and the last LayerNorm

    @property
    def parameters(self) -> int:
        return self.blocks + self.head + self.rest


def size(layers: int, width: int, vocabulary: int, positions: int) -> Size:
    """GPT-2's."""
    return Size(layers * (12 * width**2 + 13 * width), layers, vocabulary * width, positions * width + 2 * width)


def exchanged(engine: str, model: Size, accumulation: int, weight: int = 4, gradient: int = 4) -> dict[str, int]:
    """Bytes of a step by the kind of collective: the whole that is reduced or gathered, whatever the number of ranks.

    `weight` bytes of an element where weights are gathered, `gradient` where gradients are reduced.
    tests/engines/test_traffic.py counts the same on real ranks.
    """
    every, outside = model.parameters, model.head + model.rest
    if engine == "ddp":
        return {"all_reduce": gradient * every}
    if engine == "zero1":
        return {"all_reduce": gradient * every, "all_gather": weight * every}
    if engine == "zero2":
        return {"all_reduce": accumulation * gradient * every, "all_gather": weight * every}
    if engine == "fsdp whole":
        return {"all_gather": weight * every, "reduce_scatter": gradient * every}
    reduced = {"reduce_scatter": accumulation * gradient * every}
    if engine == "fsdp":  # the last block, and what lies outside of the blocks, stays from forward to backward
        kept = outside - model.blocks // model.layers
        return {"all_gather": accumulation * weight * (2 * model.blocks + kept), **reduced}
    assert engine == "zero3"  # the tied matrix is gathered for the embedding and for the head
    return {"all_gather": accumulation * weight * 2 * (every + model.head), **reduced}


# --- on paper ----------------------------------------------------------------------------------------------------


class Link(NamedTuple):
    """What connects the GPUs: bytes per second of each GPU in each direction, and seconds of one hop."""

    node: int  # GPUs of a node
    node_bytes: float
    node_hop: float
    network_bytes: float
    network_hop: float

    def bandwidth(self, gpus: int) -> float:
        return self.node_bytes if gpus <= self.node else self.network_bytes

    def ring_hops(self, gpus: int) -> float:
        """Seconds of latency for once around."""
        nodes = math.ceil(gpus / self.node)
        return (gpus - nodes) * self.node_hop + (nodes - 1 if nodes > 1 else 0) * self.network_hop

    def tree_hops(self, gpus: int) -> float:
        """Seconds of latency from the leaves of a binary tree over nodes, a chain inside each, to the root."""
        nodes = math.ceil(gpus / self.node)
        return (min(gpus, self.node) - 1) * self.node_hop + math.ceil(math.log2(nodes)) * self.network_hop


def seconds(kind: str, volume: float, messages: int, gpus: int, link: Link) -> float:
    """Of `messages` collectives that move `volume` bytes of the whole together."""
    part = (gpus - 1) / gpus * volume / link.bandwidth(gpus)
    if kind != "all_reduce":
        return part + messages * link.ring_hops(gpus)
    return 2 * part + messages * 2 * min(link.ring_hops(gpus), link.tree_hops(gpus))


def efficiency(
    engine: str, model: Size, step: float, accumulation: int, gpus: int, link: Link, *, weight: int, gradient: int
) -> float:
    """Share of the time of a step on `gpus` that is not waiting for the others; `step`: seconds of one GPU's work.

    A backward pass takes two thirds of a micro-batch. What can be exchanged meanwhile is hidden.
    """
    volumes = exchanged(engine, model, accumulation, weight, gradient)
    micro = step / accumulation
    sharded = engine in ("fsdp", "zero3")

    def took(kind: str, volume: float, messages: int) -> float:
        return seconds(kind, volume, messages, gpus, link)

    times = engine in ("fsdp", "zero2", "zero3")  # these reduce in every micro-batch
    passes = accumulation if times else 1
    reduce_kind = "all_reduce" if "all_reduce" in volumes else "reduce_scatter"
    per_pass = took(reduce_kind, volumes[reduce_kind] / passes, model.layers + 1)
    last = took(reduce_kind, gradient * (model.head + model.rest), 1)  # made last, so nothing is left to hide it
    gathered = volumes.get("all_gather", 0)
    if sharded:  # weights are gathered beside both passes, gradients reduced beside the backward
        gathers = took("all_gather", gathered / accumulation, 2 * model.layers + 1)
        first = took("all_gather", weight * (model.head + model.rest), 1)
        exposed = accumulation * max(gathers + per_pass - micro, last + first)
    else:
        exposed = passes * max(per_pass - micro * 2 / 3, last)
        if gathered and engine == "fsdp whole":  # in the first forward
            exposed += max(took("all_gather", gathered, model.layers + 1) - micro / 3, 0.0)
        elif gathered:  # DeepSpeed's, after the update
            exposed += took("all_gather", gathered, 1)
    return step / (step + exposed)


MODELS = {name: size(layers, width, 50257, 1024) for name, layers, width in (
    ("gpt2", 12, 768), ("gpt2-medium", 24, 1024), ("gpt2-large", 36, 1280), ("gpt2-xl", 48, 1600),
)}  # fmt: skip


def paper(given: argparse.Namespace) -> None:
    """One table: rows are models and engines, columns numbers of GPUs."""
    link = Link(
        given.node, given.node_gb_per_s * 1e9, given.node_hop_us * 1e-6, given.network_gb_per_s * 1e9,
        given.network_hop_us * 1e-6,
    )  # fmt: skip
    lines = [
        f"| model, seconds of a step | engine | GB exchanged a step | {' | '.join(f'{n} GPUs' for n in given.gpus)} |",
        "|---" * 2 + "|---:" * (len(given.gpus) + 1) + "|",
    ]
    figures: Figures = {}
    for run in given.run:
        name, _, words = run.partition("=")
        for engine in ENGINES:
            options = {"weight": given.weight_bytes, "gradient": given.gradient_bytes}
            moved = sum(
                (2 if kind == "all_reduce" else 1) * volume
                for kind, volume in exchanged(engine, MODELS[name], given.accumulation, **options).items()
            )
            found = {
                f"{gpus} GPUs": efficiency(
                    engine, MODELS[name], float(words), given.accumulation, gpus, link, **options
                )
                for gpus in given.gpus
            }
            figures[f"{name}, {engine}"] = {"GB": [moved / 1e9], **{key: [value] for key, value in found.items()}}
            cells = " | ".join(f"{value:.1%}" for value in found.values())
            lines.append(f"| {name}, {words} | {engine} | {moved / 1e9:.2f} | {cells} |")
    settings = {
        key: ", ".join(map(str, value)) if isinstance(value, list) else value for key, value in vars(given).items()
    }
    how = "Expected efficiency by the formula of docs/explanation/scaling.md"
    about = {"none": "a formula, nothing is measured"}
    write("scaling_paper", "Many GPUs, on paper", lines, figures, settings=settings, about=about, how=how)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--run", nargs="+", metavar="MODEL=SECONDS", default=PUBLISHED, help="a step of one GPU")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--node", type=int, default=8, help="GPUs of a node")
    parser.add_argument("--node-gb-per-s", type=float, default=400.0, help="of each GPU inside a node")
    parser.add_argument("--node-hop-us", type=float, default=1.0)
    parser.add_argument("--network-gb-per-s", type=float, default=40.0, help="of each GPU between nodes")
    parser.add_argument("--network-hop-us", type=float, default=5.0)
    parser.add_argument("--weight-bytes", type=int, default=2, help="of an element that is gathered; 2: bf16")
    parser.add_argument("--gradient-bytes", type=int, default=4, help="of an element that is reduced; 4: fp32")
    paper(parser.parse_args())


# 65,536 tokens a GPU and step on H100s with llm.c, published: 0.140 s; at 188k and at 48.5k tokens/s
PUBLISHED = ["gpt2=0.140", "gpt2-medium=0.349", "gpt2-xl=1.351"]

if __name__ == "__main__":
    main()
