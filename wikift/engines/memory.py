"""How much memory training takes, and how much there is. Estimates: they decide between engines only.

State: 16 bytes a parameter (fp32 weights, gradients, and the optimizer's two), and 2 for autocast's copies.
Activations: 39 bytes a token, layer and width with matmuls in half precision, 66 in fp32, counted tensor by tensor as
a GPU would hold them (Korthikanti et al., arXiv:2205.05198, equation 1, have 34 with a residual in half precision), or
4 of each block and one block's all with gradient checkpointing. A CPU keeps the pairs of attention besides. Logits are
held of some positions (head.py).
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

import torch

from wikift.base.errors import EnvironmentFault
from wikift.base.shape import Shape
from wikift.base.world import World

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h's

STATE_BYTES = 16


def training_bytes(
    shape: Shape, *, block_size: int, micro_batch: int, precision: str, checkpointing: bool, on_cpu: bool
) -> int:
    """Bytes of one process that holds all of the state."""
    tokens, wide = block_size * micro_batch, precision == "fp32"
    block = (66 if wide else 39) * shape.n_embd + (2 * shape.n_head * block_size if on_cpu else 0)
    beside = 13 * shape.n_embd  # the embedding's and the head's
    if on_cpu and precision != "fp16":
        logits = min(tokens, 2048) * shape.vocab_size * (4 if wide else 2)
    else:
        logits = min(tokens, 4096) * shape.vocab_size * (8 if wide else 10)
    if checkpointing:  # a block's all is there only when the logits are gone
        held = max(logits, block * tokens) + 4 * shape.n_embd * shape.n_layer * tokens
    else:
        held = logits + block * shape.n_layer * tokens + (0 if wide else 2 * shape.parameters)
    return STATE_BYTES * shape.parameters + beside * tokens + held


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


@contextlib.contextmanager
def explained(device: torch.device) -> Iterator[None]:
    """torch's word that memory is used up, as an EnvironmentFault that says what to do."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        where = f"{torch.cuda.get_device_name(device)} is" if device.type == "cuda" else "this machine is"
        raise EnvironmentFault(
            f"{where} out of memory ({str(error).split('. ')[0]}). A smaller --per-device-train-batch-size (the global "
            "batch stays), --gradient-checkpointing, or --engine fsdp or --deepspeed on several GPUs takes less, and "
            "the same command with it resumes from the newest checkpoint; else a smaller --model or --block-size"
        ) from None


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees: glibc would give large tensors back and fetch them each step.

    Fetching them afresh is a page fault for each 4 KB, 7% of a step's processor time on a CPU (measured).
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
        mallopt(_M_TOP_PAD, 64 << 20)
