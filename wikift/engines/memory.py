"""How much memory training takes, and how much there is. Estimates: they choose the engine and the micro-batch.

State: 16 bytes a parameter (fp32 weights, gradients, and the optimizer's two), and 2 for autocast's copies.
Activations: 39 bytes a token, layer and width with matmuls in half precision, 66 in fp32, counted tensor by tensor as
a GPU would hold them (Korthikanti et al., arXiv:2205.05198, equation 1, have 34 with a residual in half precision), or
4 of each block and one block's all with gradient checkpointing. A CPU keeps the pairs of attention besides, the head's
gradient twice for a moment, and a quarter more where gradients that stay lie between what comes and goes (measured
within 13% of the peak of 10 runs, 30M to 124M parameters). Logits are held of some positions (kernels/loss.py).
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

import torch

from wikift.base.errors import EnvironmentFault
from wikift.base.world import World
from wikift.engines.base import Work
from wikift.kernels.loss import positions_at_once

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h's

# by the controllers in /proc/self/cgroup, none in version 2: the limit, what is used, and its prefix of the cache
_GROUP_FILES = {
    "": ("memory.max", "memory.current", ""),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
}


def training_bytes(work: Work, ranks: int, *, gpu: int) -> int:
    """Bytes that training takes on each of `ranks` processes, with GPUs of `gpu` bytes, or on a CPU (0)."""
    on_cpu = not gpu
    engine = work.engine.name
    shape, wide, checkpointing = work.shape, work.precision == "fp32", work.gradient_checkpointing
    tokens = work.block_size * work.micro_batch
    block = (66 if wide else 39) * shape.n_embd + (2 * shape.n_head * work.block_size if on_cpu else 0)
    beside = 13 * shape.n_embd * tokens  # the embedding's and the head's
    if on_cpu and work.precision != "fp16":
        logits = min(tokens, 2048) * shape.vocab_size * (4 if wide else 2)
    else:
        logits = min(tokens, positions_at_once(shape.vocab_size, gpu)) * shape.vocab_size * (8 if wide else 10)
    if checkpointing:  # a block's all is there only when the logits are gone
        held = max(logits, block * tokens) + 4 * shape.n_embd * shape.n_layer * tokens
    else:
        held = logits + block * shape.n_layer * tokens
        held += 2 * shape.parameters if engine in ("single", "ddp") and not wide else 0
    need = _state_bytes(work, engine, ranks, on_cpu) + beside + held
    if on_cpu:
        need += 8 * shape.vocab_size * shape.n_embd + 50_000_000 + (held // 4 if work.accumulation > 1 else 0)
        need += 12 * shape.parameters // ranks if work.save_aside else 0  # copied, to be written meanwhile
    return need


def _state_bytes(work: Work, engine: str, ranks: int, on_cpu: bool) -> int:
    """Weights, gradients and optimizer state on each of `ranks`, and what is gathered of them for a moment."""
    total, low = work.shape.parameters, 4 if work.precision == "fp32" else 2
    if engine in ("single", "ddp"):  # beside DDP's buckets is what it accumulates
        return (16 + 4 * (engine == "ddp" and work.accumulation > 1)) * total
    if engine == "fsdp" and not work.fsdp_reshard:
        return 16 * total // ranks + (low + 4) * total
    # the embedding, the block at work and the next, and their gradients
    gathered = (low + 4) * (work.shape.vocab_size * work.shape.n_embd + 2 * 12 * work.shape.n_embd**2)
    if not on_cpu and "offload" in str(work.zero_config):
        return low * total + gathered
    if engine == "fsdp":
        return 16 * total // ranks + gathered
    copies = {"zero1": (low + 4) * total, "zero2": low * total + 4 * total // ranks}  # else of zero3
    return 12 * total // ranks + gathered + copies.get(engine, (low + 4) * total // ranks)


def available_bytes(world: World) -> int:
    """What one process may take: its GPU's free memory, or its share of the host's; without end where none tells."""
    if world.device.type == "cuda":
        return int(torch.cuda.mem_get_info(world.device)[0])
    return host_bytes() // world.local_size


def host_bytes(root: Path = Path("/")) -> int:
    """What the host and every control group (of either version) over this process still have to give."""
    rooms = []
    with contextlib.suppress(OSError, KeyError, ValueError):
        facts = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
        rooms.append(int(facts["MemAvailable"].split()[0]) * 1024)
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                group = Path(root / "sys/fs/cgroup" / controllers)
                for folder in (group / path.strip("/"), *(group / path.strip("/")).parents):
                    rooms += _room(folder, *(_GROUP_FILES[controllers]))
    return min(rooms, default=1 << 60)


def _room(group: Path, limit: str, used: str, files: str) -> list[int]:
    """What a control group's limit leaves, the cache of files being for the taking; nothing without a limit."""
    with contextlib.suppress(OSError, KeyError, ValueError):  # no such group in this container, or "max"
        facts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        cache = sum(int(facts[f"{files}{kind}_file"]) for kind in ("active", "inactive"))
        return [max(0, int((group / limit).read_text()) - int((group / used).read_text()) + cache)]
    return []


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
