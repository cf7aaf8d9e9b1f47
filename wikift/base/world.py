"""Who am I among the processes: start, stop, sums over ranks, seeds.

Without a launcher there is a single process and no process group. CUDA ranks get gloo beside nccl, so that small
numbers on the host never wait for the device.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from wikift.base.console import print
from wikift.base.errors import UserError
from wikift.base.launcher import Launch, launch, meeting, name_of_start, reach_store

COLLECTIVE_SECONDS = 1800.0
_MEETING = datetime.timedelta(minutes=30)
_NVIDIA_DRIVER = Path("/dev/nvidiactl")
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second is the old name


@dataclass(frozen=True)
class World:
    """One process' place: `rank` of `size`, `local_rank` of `local_size` on its host, and the device it computes on."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    local_size: int = 1
    passed: Callable[[], None] = lambda: None  # told of every collective that the host takes part in

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of `value` over all ranks, the same on each; collective."""
        self.passed()
        if self.size == 1:
            return value
        summed = value.clone()
        dist.all_reduce(summed)
        return summed

    def highest(self, number: int) -> int:
        """The largest of the ranks' numbers (below 2**53), on every rank; collective."""
        return int(max(row[0] for row in self.exchange([number])))

    def exchange(self, numbers: Sequence[float]) -> list[list[float]]:
        """Every rank's `numbers`, equally many, by rank; one all-reduce on the host, collective."""
        return self.ask(numbers)()

    def ask(self, numbers: Sequence[float]) -> Callable[[], list[list[float]]]:
        """Begin to `exchange`: what this returns waits for the others."""
        self.passed()
        rows = torch.zeros(self.size, len(numbers), dtype=torch.float64)
        rows[self.rank] = torch.tensor(numbers, dtype=torch.float64)  # a row of its own, so that a sum does
        work = dist.all_reduce(rows, async_op=True) if self.size > 1 else None

        def answer() -> list[list[float]]:
            if work is not None:
                work.wait()
            return rows.tolist()

        return answer

    def barrier(self) -> None:
        self.total(torch.zeros(1))

    def shared(self, value: Any, source: int = 0) -> Any:
        """The `value` of rank `source`, one that JSON can hold, on every rank; collective."""
        if self.size == 1:
            return value
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        length = torch.tensor(len(text))
        dist.broadcast(length, source)
        text = text if self.rank == source else torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(text, source)
        return json.loads(text.numpy().tobytes())


def seed(seed: int, *parts: int | str) -> int:
    """A 63-bit seed that depends on `seed` and on each of `parts`, so that no two uses share a random stream.

    Sums like `seed + epoch` collide: seed 1 in epoch 1 would draw what seed 2 draws in epoch 0.
    """
    digest = hashlib.blake2b(repr((seed, *parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def be_deterministic() -> None:
    """Let torch use kernels alone that give the same bits in every run, and raise where there is none."""
    # before the first matmul: https://pytorch.org/docs/stable/notes/randomness.html
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a pass over each tensor


def start_world(device: str = "auto", seconds: float = COLLECTIVE_SECONDS) -> World:
    """Join the process group that the launcher describes, or one that the caller started already.

    A collective that takes longer than `seconds` fails, gloo's and NCCL's. `device` is auto, cpu or cuda. Raises
    UserError where CUDA is asked for and absent, or has fewer devices than ranks.
    """
    here = launch()
    chosen = device_of(device, here)
    if here.local_size > 1:
        # torchrun gives every rank one thread, DeepSpeed's launcher all cores; share them out instead, beside a GPU
        # too, for an optimizer that is offloaded
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here.local_size))
    if dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size(), here.local_rank or 0, chosen, here.local_size)
    if not here.started:
        return World(device=chosen)
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")  # else each rank connects to all others at once
    store = shared_store("wikift/group")
    if chosen.type == "cuda":
        _refuse_shared_gpus(here, chosen, store)
    dist.init_process_group(
        _backend(chosen),
        store=store,
        rank=here.rank,
        world_size=here.size,
        timeout=datetime.timedelta(seconds=seconds),
        # for one rank it makes NCCL fail in later groups (deepspeedai/DeepSpeed#8248)
        device_id=chosen if chosen.type == "cuda" and here.size > 1 else None,
    )
    return World(here.rank, here.size, here.local_rank or 0, chosen, here.local_size)


def _refuse_shared_gpus(here: Launch, device: torch.device, store: Any) -> None:
    """Raises UserError on every rank where two of them were given one GPU; NCCL would say less of it, and later."""
    keys = [f"gpu/{rank}" for rank in range(here.size)]
    store.set(keys[here.rank], str(torch.cuda.get_device_properties(device).uuid))
    uuids = store.multi_get(keys)
    ranks = [[str(rank) for rank, other in enumerate(uuids) if other == uuid] for uuid in dict.fromkeys(uuids)]
    if shared := [f"ranks {', '.join(group)} share one" for group in ranks if len(group) > 1]:
        raise UserError(
            f"--nproc_per_node {here.local_size}: needs a GPU for each process, {' and '.join(shared)}; start fewer "
            "processes (deepspeed: --num_gpus, slots in the hostfile), let srun give each task its own "
            "(--gpus-per-task=1), or use --device cpu"
        )


def shared_store(prefix: str, timeout: datetime.timedelta = _MEETING) -> Any:
    """What the ranks tell each other under `prefix`, by a connection of its own; waits until all can be reached."""
    here = launch()
    if dist.is_initialized() and not here.address:  # whoever started the process group knows
        return torch.distributed.distributed_c10d.PrefixStore(prefix, dist.distributed_c10d._get_default_store())
    if not here.address:
        raise UserError("MASTER_ADDR: is not set beside RANK; it is the host of rank 0, which torchrun sets")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        prefix = f"{_name_of_start()}/{prefix}"
    return torch.distributed.distributed_c10d.PrefixStore(prefix, _connect(here, timeout))


def _connect(here: Launch, timeout: datetime.timedelta) -> Any:
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        reach_store(here.address)
    return next(iter(rendezvous(f"tcp://{here.address}", here.rank, here.size, timeout=timeout)))[0]


@functools.cache
def _name_of_start() -> str:
    return name_of_start(_connect(launch(), _MEETING), launch(), _MEETING.total_seconds())


def first_on_each_host(work: Callable[[], None], seconds: float) -> None:
    """Do `work` on the first rank of each host, then on its other ranks, which find what the first left on the disk.

    Needs no process group. Where a first rank fails, the others of its host raise UserError; where a rank does not come
    within `seconds`, the others raise EnvironmentFault.
    """
    here = launch()
    if here.size == 1:
        work()
        return
    store, first = _hosts(seconds), str(here.rank - (here.local_rank or 0))
    while here.local_rank and not store.check([first]):  # hours, where a large text is prepared
        time.sleep(0.1)
    if here.local_rank and store.get(first) != b"done":
        raise UserError(f"rank {first} failed; see its message")
    try:
        work()
    except BaseException:
        store.set(first, "failed")
        raise
    store.set(first, "done")


@functools.cache  # the first rank's has the server in it, which ends with it
def _hosts(seconds: float) -> Any:
    if dist.is_initialized():  # the caller's group
        own = torch.distributed.distributed_c10d
        return own.PrefixStore("wikift/hosts", own._get_default_store())
    with meeting(launch().rank):
        return shared_store("wikift/hosts", datetime.timedelta(seconds=seconds))


def join_group(world: World) -> None:
    """Make sure that there is a process group: sharding engines want one even for a single process."""
    if not dist.is_initialized():
        assert world.size == 1
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(_backend(world.device), store=store, rank=0, world_size=1)


def _backend(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def stop_world() -> None:
    """Wait for the other ranks: none may leave while another still needs it.

    The process group is left standing, and `command.run` leaves without destructors: one of gloo's waits for a thread
    that waits for Python's lock (seen with torch 2.13: a rank in some dozens never ended).
    """
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))


def device_of(requested: str, here: Launch) -> torch.device:
    if requested == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        fix = (
            "pip uninstall torch, then the pip install line for CUDA that https://pytorch.org/get-started/locally shows"
        )
        if requested == "cuda":
            build = "" if torch.version.cuda else f", torch {torch.__version__} is a build for CPUs"
            raise UserError(f"--device cuda: torch sees no CUDA device{build}; use --device cpu, or {fix}")
        driver = _NVIDIA_DRIVER.exists() or shutil.which("nvidia-smi") is not None
        if driver and torch.version.cuda is None and here.rank == 0:
            text = f"torch {torch.__version__} is a build for CPUs, the NVIDIA GPU here is not used; {fix}"
            print(f"wikift: warning: {text}", file=sys.stderr)
        if torch.version.cuda and _NVIDIA_DRIVER.exists() and "CUDA_VISIBLE_DEVICES" not in os.environ:
            raise UserError(
                f"--device auto: there is an NVIDIA driver, but torch {torch.__version__} cannot use it (most often it "
                f"is older than CUDA {torch.version.cuda}); update the driver, install a torch for an older CUDA "
                "(https://pytorch.org/get-started/locally), or use --device cpu"
            )
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if here.size > 1 and here.local_rank is None and count > 1:
        raise UserError("LOCAL_RANK: is not set beside RANK, to choose among several GPUs; torchrun and srun set it")
    # srun may let each task see GPUs of its own, numbered from 0; whether two ranks share one is seen by its UUID
    device = torch.device("cuda", (here.local_rank or 0) % count)
    if not any(name in os.environ for name in _ALLOCATOR):  # read at the first allocation
        # micro-batches, validation and samples differ in size: segments that grow leave fewer gaps between them
        os.environ[_ALLOCATOR[0]] = "expandable_segments:True"
    torch.cuda.set_device(device)
    return device
