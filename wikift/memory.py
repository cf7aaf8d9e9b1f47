"""How much memory training takes under an engine, and how much there is. Estimates: they decide between engines only.

State: 16 bytes a parameter (fp32 weights, gradients, and the optimizer's two), divided by the ranks where an engine
shards it. Activations: 34 bytes a token, layer and width in half precision (Korthikanti et al., arXiv:2205.05198,
equation 1 without the attention matrix, which sdpa does not keep), double in fp32; logits twice in fp32.
"""

from __future__ import annotations

import contextlib
import ctypes

import torch

from wikift.shape import Shape
from wikift.world import World

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h's

STATE_BYTES = 16


def training_bytes(
    shape: Shape, *, block_size: int, micro_batch: int, precision: str, checkpointing: bool, shards: int = 1
) -> int:
    """Bytes of one process with its state split over `shards`."""
    tokens = block_size * micro_batch
    per_layer = 2 if checkpointing else 34
    activations = per_layer * (2 if precision == "fp32" else 1) * tokens * shape.n_embd * shape.n_layer
    return STATE_BYTES * shape.parameters // shards + activations + 8 * tokens * shape.vocab_size


def available_bytes(world: World) -> int | None:
    """What one process may take: its GPU's memory, or its share of the host's; None where the host does not tell."""
    if world.device.type == "cuda":
        return int(torch.cuda.get_device_properties(world.device).total_memory)
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            facts = dict(line.split(":", 1) for line in file)
        return int(facts["MemAvailable"].split()[0]) * 1024 // world.local_size
    except (OSError, KeyError, ValueError):
        return None


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees: glibc would give large tensors back and fetch them each step.

    Fetching them afresh is a page fault for each 4 KB, 7% of a step's processor time on a CPU (measured).
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
        mallopt(_M_TOP_PAD, 64 << 20)
