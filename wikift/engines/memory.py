"""How much memory training takes, and how much there is. Estimates: they choose the engine and the micro-batch.

Each part names its formula. Sources: `state_parts` and `_passes`; the rest was read off pretended GPUs and off the
peaks of real processes (docs/how-to/out-of-memory.md).
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from wikift.base.errors import EnvironmentFault
from wikift.base.files import show_bytes
from wikift.base.shape import RELEASED, released_shape
from wikift.base.work import Choice, Work
from wikift.base.world import World
from wikift.kernels.loss import gpu_bytes, positions_at_once

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h's

# of an error that is no torch.OutOfMemoryError: the CPU's allocator, cuBLAS and cuDNN, the driver
_OUT_OF_MEMORY = ("can't allocate memory", "_STATUS_ALLOC_FAILED", "CUDA error: out of memory")
FULL = 0.9  # part of the memory that an estimate may fill
# by the controllers in /proc/self/cgroup, none in version 2: the limit, what is used, and its prefix of the cache
_GROUP_FILES = {
    "": ("memory.max", "memory.current", ""),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
}


SYMBOLS = "P parameters, N processes, L layers, d width, h heads, V vocabulary, T tokens of a block, B micro-batch"


class Part(NamedTuple):
    """A part of what one process holds, and the formula that says so."""

    bytes: int
    formula: str


class Machine(NamedTuple):
    """Where a run is computed: `room` is what each of the ranks may fill, in bytes."""

    ranks: int
    local: int  # of the ranks, on one host
    gpu: int  # bytes of a rank's GPU, 0 for a CPU
    room: int


def training_bytes(work: Work, ranks: int, *, gpu: int) -> int:
    """Bytes that training takes on each of `ranks` processes, with GPUs of `gpu` bytes, or on a CPU (0)."""
    return sum(part.bytes for part in memory_parts(work, ranks, gpu=gpu).values())


def memory_parts(work: Work, ranks: int, *, gpu: int) -> dict[str, Part]:
    """What training holds on each of `ranks` processes at its peak, by kind."""
    shape, engine, low = work.shape, work.engine.name, 4 if work.precision == "fp32" else 2
    if engine.startswith("zero"):  # 4 of the optimizer's 12 bytes are the weights that it updates
        offload = str(work.zero_config) if gpu else ""
        optimizer, weights = ("offload_" + name in offload for name in ("optimizer", "param"))
        sizes = (
            0 if weights else low,
            0 if weights else 4,
            0 if optimizer else 12,
        )  # stage 2 adds up where it computes
        parts = state_parts(shape.parameters, ranks, int(engine[4]), *sizes)
    else:
        parts = state_parts(shape.parameters, ranks, 3 if engine == "fsdp" else 0)
    passes = _passes(work, gpu)
    return parts | passes | {"buffers": _sum(_buffers(work, ranks, gpu, passes))}


def memory_line(work: Work, machine: Machine) -> str:
    """The forecast of one process for people."""
    parts = memory_parts(work, machine.ranks, gpu=machine.gpu)
    each = ", ".join(f"{name} {show_bytes(part.bytes)}" for name, part in parts.items() if part.bytes)
    return f"memory: about {show_bytes(sum(part.bytes for part in parts.values()))} a process: {each}"


def state_parts(
    parameters: int, ranks: int, stage: int, weights: int = 4, gradients: int = 4, optimizer: int = 8
) -> dict[str, Part]:
    """What each of `ranks` holds of a model: the ZeRO paper's section 3 and figure 1 (arXiv:1910.02054).

    Stage 1 divides the optimizer's state, 2 the gradients too, 3 the weights too. The last three are bytes a parameter:
    2, 2, 12 in the paper; 2, 6, 12 in DeepSpeed's estimator of stage 2; 2, 4, 12 in that of stage 3, which adds 4 for
    each parameter of the largest layer.
    """
    kinds, parts = {"weights": (weights, 3), "gradients": (gradients, 2), "optimizer": (optimizer, 1)}, {}
    for name, (each, divided) in kinds.items():
        over = ranks if stage >= divided else 1
        parts[name] = Part(each * parameters // over, f"{each}P{'/N' if stage >= divided else ''}" if each else "0")
    return parts


def _passes(work: Work, gpu: int) -> dict[str, Part]:
    """Activations, counted tensor by tensor as a GPU would hold them, and logits, which are held of some positions.

    39 bytes a token, layer and width with matmuls in half precision, 35 with the residual too, 66 in fp32 (Korthikanti
    et al., arXiv:2205.05198, equation 1, have 34 with a residual in half precision), or the residual of each block and
    one block's all with gradient checkpointing. A CPU keeps the pairs of attention besides.
    """
    residual = 2 if work.residual_dtype == "bf16" else 4
    shape, tokens, wide = work.shape, work.block_size * work.micro_batch, work.precision == "fp32"
    if gpu or work.precision == "fp16":
        # a GPU's softmax reads fp16 as it is, and bf16 converted
        size = 8 if wide else 6 if gpu and work.precision == "fp16" else 10
        rows = positions_at_once(tokens, shape.vocab_size, gpu)
    else:
        rows, size = min(tokens, 2048), 4 if wide else 2
    logits = Part(size * rows * shape.vocab_size, f"{size}V·{rows:,}")
    width = 66 if wide else 31 + 2 * residual
    per_token = width * shape.n_embd + (0 if gpu else 2 * shape.n_head * work.block_size)
    block = f"{width}d" if gpu else f"({width}d + 2hT)"
    layers, other = shape.n_layer, 1 + 3 * residual  # of the embedding and the head
    beside = other * shape.n_embd
    if not work.gradient_checkpointing:
        activations = Part((layers * per_token + beside) * tokens, f"({block}L + {other}d)BT")
    else:  # a block's all is there only when the logits are gone
        more = max(0, per_token * tokens - logits.bytes)
        activations = Part(
            (residual * layers * shape.n_embd + beside) * tokens + more,
            f"({residual}dL + {other}d)BT + max(0, {block}BT - logits)",
        )
    return {"activations": activations, "logits": logits}


def _buffers(work: Work, ranks: int, gpu: int, passes: dict[str, Part]) -> Iterator[Part]:
    """What is there for a moment, or beside the state: copies in half precision, gathered weights, buckets."""
    shape, engine, low = work.shape, work.engine.name, 4 if work.precision == "fp32" else 2
    total, embedding, logits = shape.parameters, shape.vocab_size * shape.n_embd, passes["logits"].bytes
    if engine in ("single", "ddp"):
        if low == 2 and not (gpu and work.gradient_checkpointing):
            yield Part(2 * total, "2P")  # autocast's
        if engine == "ddp" and work.accumulation > 1:
            yield Part(4 * total, "4P")  # beside DDP's buckets is what it accumulates
    elif engine == "fsdp" and not work.fsdp_reshard:
        yield Part((low + 4) * total, f"{low + 4}P")
    else:  # a GPU pads a copy of the head's weight; its gradient is fp32, and there again where it is offloaded
        times = 4 + (low if gpu else 0) + 4 * (gpu > 0 and "offload" in str(work.zero_config))
        if engine in ("fsdp", "zero3"):  # gathered: the embedding, the block at work and the next; and their gradients
            times += low + 4 * (engine == "zero3" and not gpu)
            blocks = max(0, (low + 4) * 24 * shape.n_embd**2 - logits)
            yield Part(blocks, f"max(0, {24 * (low + 4)}d² - logits)")
        yield Part(times * embedding, f"{times}Vd")
    if not gpu:
        yield Part(4 * embedding + 50_000_000, "4Vd + 50 MB")  # the head's gradient is there twice for a moment
        if work.accumulation > 1 and engine != "ddp":  # beside the one that stays, which lies in DDP's buckets
            yield Part(8 * embedding, "8Vd")
        if ranks > 1:  # as what is sent does
            each = low + 4 * (engine == "zero3")
            yield Part(each * total, f"{each}P")
        if work.save_aside:  # copied, to be written meanwhile
            yield Part(12 * total // ranks, "12P/N")


def _sum(parts: Iterable[Part]) -> Part:
    parts = [*parts] or [Part(0, "0")]
    return Part(sum(part.bytes for part in parts), " + ".join(part.formula for part in parts))


def machine_of(world: World) -> Machine:
    """The ranks of `world`, and nine tenths of what the one with the least memory has free; collective."""
    room = int(-world.highest(-available_bytes(world)) * FULL)
    return Machine(world.size, world.local_size, gpu_bytes(world.device), room)


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
def explained(work: Work, world: World) -> Iterator[None]:
    """torch's word that memory is used up, as an EnvironmentFault that says what would take less."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not any(sign in str(error) for sign in _OUT_OF_MEMORY):
            raise
        on_gpu = world.device.type == "cuda"
        where = f"{torch.cuda.get_device_name(world.device)} is" if on_gpu else "this machine is"
        reason = ". ".join(str(error).split(". ")[:3]).rstrip(".")  # what was asked for, and what was free
        gpu = gpu_bytes(world.device)
        need = training_bytes(work, world.size, gpu=gpu)
        less = ways_out(work, Machine(world.size, world.local_size, gpu, need - 1))
        raise EnvironmentFault(
            f"{where} out of memory ({reason}). By estimate this run takes {show_bytes(need)} per process; take {less}"
            "; the same command resumes from the newest checkpoint; another --block-size or --model is another run"
        ) from None


def ways_out(work: Work, machine: Machine) -> str:
    """What takes less memory than `machine` has room for, of each kind the first, and how much by the same estimate."""
    (ranks, local, gpu, room), lengths = machine, (512, 256, 128)
    share, half = work.micro_batch * work.accumulation, work.micro_batch // 2
    smaller = [n for n in range(half, 0, -1) if share % n == 0]
    fewer = [n for n in range(ranks - 1, 0, -1) if not gpu and ranks == local and ranks % n == 0]
    shapes = {name: released_shape(name) or work.shape for name in reversed(RELEASED)}
    batches = {n: replace(work, micro_batch=n, accumulation=share // n) for n in smaller}
    kinds: list[list[tuple[str, Work, int]]] = [
        [(f"--per-device-train-batch-size {n}", less, ranks) for n, less in batches.items()],
        [("--gradient-checkpointing", replace(work, gradient_checkpointing=True), ranks)],
        [("--engine fsdp", replace(work, engine=Choice("fsdp", "")), ranks)] if ranks > 1 else [],
        [(f"--nproc_per_node={n}", replace(work, engine=Choice("ddp" if n > 1 else "single", "")), n) for n in fewer],
        [(f"--block-size {n}", replace(work, block_size=n), ranks) for n in lengths if n < work.block_size],
        [(f"--model {name}", replace(work, shape=shape), ranks) for name, shape in shapes.items()],
    ]
    ways = []
    for kind in kinds:
        needs = ((way, training_bytes(less, n, gpu=gpu), n) for way, less, n in kind)
        ways += [f"{way} ({show_bytes(need)})" for way, need, n in needs if need * n <= room * ranks][:1]
    return " or ".join(ways) or "a smaller --model or more memory"


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees: glibc would give large tensors back and fetch them each step.

    Fetching them afresh is a page fault for each 4 KB, 7% of a step's processor time on a CPU (measured).
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
        mallopt(_M_TOP_PAD, 64 << 20)
