"""--compile on a pretended GPU: one graph for all blocks, compiled once, and what Inductor makes of it.

Its passes and its scheduler run to the end, which takes no triton; that would write the kernels, which nobody runs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch

from tests.cuda.pretended import pretended
from tests.cuda.test_parts import Zeros
from tests.ranks import run_ranks
from tests.tiny_engines import make_engine, tiny_config

MICRO_BATCH, LENGTH = 8, 1024


class Kernels(NamedTuple):
    """What Inductor makes itself of a graph, not matmuls and attention, and the bytes that it reads and writes."""

    graph: str  # forward, backward
    count: int
    bytes: int


def inductor(made: list[Kernels]) -> Callable[..., Any]:
    """A compiler for torch.compile that counts into `made` what Inductor would, and runs the graph as it is."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor import debug, scheduler
    from torch._inductor.compile_fx import _recursive_joint_graph_passes, _recursive_post_grad_passes
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes import fuse_attention, misc_patterns, pad_mm
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    scheduler.has_triton = lambda: True
    # patterns that are traced on a real device; of none of them is anything here
    fuse_attention._sfdp_init = misc_patterns._misc_patterns_init = pad_mm._pad_mm_init = lambda *_, **__: None

    others = (scheduler.ExternKernelSchedulerNode, scheduler.NopKernelSchedulerNode)

    def lowered(graph_module: Any, example: Any, *, graph: str) -> Any:
        with V.set_fake_mode(torch._guards.detect_fake_mode(example)):
            _recursive_post_grad_passes(graph_module, is_inference=False)
            lowering = GraphLowering(graph_module, example_inputs=example, is_backward=graph == "backward")
            with V.set_graph_handler(lowering), V.set_debug_handler(debug.DebugContext()):
                lowering.run(*example)
                lowering._update_scheduler()
                own = [node for node in lowering.scheduler.nodes if not isinstance(node, others)]
                made.append(Kernels(graph, len(own), sum(n.get_read_write_buffers_sizes() for n in own)))
        return make_boxed_func(graph_module.forward)

    def partition(graph_module: Any, inputs: Any, **more: Any) -> Any:
        with V.set_fake_mode(torch._guards.detect_fake_mode(inputs)):
            _recursive_joint_graph_passes(graph_module)
        return min_cut_rematerialization_partition(graph_module, inputs, **{"compiler": "inductor", **more})

    return aot_autograd(
        fw_compiler=partial(lowered, graph="forward"),
        bw_compiler=partial(lowered, graph="backward"),
        decompositions=select_decomp_table(),
        partition_fn=partition,
    )


def steps(kind: str, ranks: int, residual: str) -> tuple[list[int], dict[str, int], list[Kernels]]:
    """Graphs after the first step and after a second, with windows of other lengths between; breaks; kernels."""
    from torch._dynamo.utils import counters

    made: list[Kernels] = []
    torch.compile = partial(torch.compile, backend=inductor(made))
    with pretended(ranks=ranks):
        from torch._dynamo.device_interface import CudaInterface

        from wikift.base.world import start_world

        CudaInterface.get_device_properties = staticmethod(torch.cuda.get_device_properties)
        config = tiny_config(0.1, n_layer=2, n_head=12, n_embd=768, n_positions=LENGTH, vocab_size=50257)
        engine = make_engine(
            kind,
            start_world("cuda"),
            config,
            micro=MICRO_BATCH,
            accumulation=2,
            precision="bf16",
            compile=True,
            residual_dtype=residual,
        )
        engine.restore(Zeros())
        graphs = []
        for _ in range(2):
            for last in (False, True):
                blocks = torch.zeros(MICRO_BATCH, LENGTH + 1, dtype=torch.int64).pin_memory()
                engine.forward_backward(blocks, last=last)
            engine.step(1e-3)
            for rows, length in ((MICRO_BATCH, LENGTH), (1, LENGTH), (1, 3)):
                window = torch.zeros(rows, length, dtype=torch.int64)
                engine.nll(window, window)
            engine.next_logits(window, window, window)
            graphs.append(counters["stats"]["unique_graphs"])
    return graphs, dict(counters["graph_break"]), made


# Inductor's own kernels of a block, forward and backward, and what they read and write (docs/explanation/gpu.md)
FEW = [
    ("single", 1, "fp32", 34, 1022e6),
    ("single", 1, "bf16", 34, 884e6),
    ("ddp", 8, "fp32", 34, 1022e6),
    ("fsdp", 8, "fp32", 22, 937e6),
]
MORE = [("zero1", 8, "fp32", 22, 937e6)]


@pytest.mark.parametrize(
    ("kind", "ranks", "residual", "kernels", "size"),
    [*FEW, *(pytest.param(*case, marks=pytest.mark.long) for case in MORE)],
)
def test_a_block_is_one_graph_and_compiled_once(
    kind: str, ranks: int, residual: str, kernels: int, size: float
) -> None:
    (((first, second), breaks, made),) = run_ranks(steps, 1, kind, ranks, residual)
    assert first == second == 2, "a graph for all blocks, and one for the passes over the logits"
    assert not breaks
    passes = [one for one in made if one.bytes > 8192 * 50257 * 4]
    block = [one for one in made if one not in passes]
    assert [one.count for one in passes] == [1]
    assert [one.graph for one in block] == ["forward", "backward"]
    assert sum(one.count for one in block) <= kernels
    assert sum(one.bytes for one in block) <= size
