"""Who am I among the processes: start, stop, sums over ranks, seeds, and how a failing rank ends all of them.

The launcher sets RANK, WORLD_SIZE, LOCAL_RANK, the rendezvous and LOCAL_WORLD_SIZE (torchrun) or LOCAL_SIZE
(DeepSpeed's); without one there is a single process and no process group. CUDA ranks get gloo beside nccl, so that
small numbers on the host never wait for the device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from wikift.base.errors import EnvironmentFault, UserError
from wikift.commands.main import EXIT_FAULT, EXIT_USER, report

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)
_FAILED = "wikift/failed"
_NVIDIA_DRIVER = Path("/dev/nvidiactl")
_GRACE_SECONDS = 5.0
_TELL = datetime.timedelta(seconds=20)


@dataclass(frozen=True)
class World:
    """One process' place: `rank` of `size`, `local_rank` of `local_size` on its host, and the device it computes on."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    local_size: int = 1

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of `value` over all ranks, the same on each; collective."""
        if self.size == 1:
            return value
        summed = value.clone()
        dist.all_reduce(summed)
        return summed

    def highest(self, number: int) -> int:
        """The largest of the ranks' numbers, on every rank; collective."""
        value = torch.tensor(number)
        if self.size > 1:
            dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    def agree(self, word: int, numbers: Sequence[float] = ()) -> tuple[int, list[float]]:
        """The highest of the ranks' words and the sums of their numbers, in one all-reduce on the host; collective."""
        if self.size == 1:
            return word, list(numbers)
        words = [0.0] * self.size
        words[self.rank] = float(word)  # each has a place of its own, so that one sum does for both
        given = torch.tensor([*numbers, *words], dtype=torch.float64)
        dist.all_reduce(given)
        found = given.tolist()
        return int(max(found[len(numbers) :])), found[: len(numbers)]

    def barrier(self) -> None:
        """Wait for all ranks, on the host."""
        self.total(torch.zeros(1))

    def agreed(self, number: int) -> int:
        """Rank 0's `number` on every rank; collective."""
        return int(self.total(torch.tensor(number if self.rank == 0 else 0, dtype=torch.int64)))


def seed(seed: int, *parts: int | str) -> int:
    """A 63-bit seed that depends on `seed` and on each of `parts`, so that no two uses share a random stream.

    Sums like `seed + epoch` collide: seed 1 in epoch 1 would draw what seed 2 draws in epoch 0.
    """
    digest = hashlib.blake2b(repr((seed, *parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def be_deterministic() -> None:
    """Let torch use kernels alone that give the same bits in every run, and raise where there is none."""
    # before the first product: https://pytorch.org/docs/stable/notes/randomness.html
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a pass over each tensor


def start_world(device: str = "auto") -> World:
    """Join the process group that the launcher describes, or one that the caller started already.

    `device` is auto, cpu or cuda. Raises UserError where CUDA is asked for and absent, or has fewer devices than ranks.
    """
    local_rank, local_size = _local_place()
    place = _device(device, local_rank, local_size)
    if local_size > 1:
        # torchrun gives every rank one thread, DeepSpeed's launcher all cores; share them out instead, beside a GPU
        # too, for an optimizer that is offloaded
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    if dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size(), local_rank, place, local_size)
    if "RANK" not in os.environ:
        return World(device=place)
    store, rank, size = next(iter(rendezvous("env://", timeout=COLLECTIVE_TIMEOUT)))
    dist.init_process_group(
        _backend(place),
        store=torch.distributed.distributed_c10d.PrefixStore("wikift/group", store),
        rank=rank,
        world_size=size,
        timeout=COLLECTIVE_TIMEOUT,
        # for one rank it makes NCCL fail in later groups (deepspeedai/DeepSpeed#8248)
        device_id=place if place.type == "cuda" and size > 1 else None,
    )
    return World(rank, size, local_rank, place, local_size)


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


@contextlib.contextmanager
def started_world(device: str = "auto") -> Iterator[World]:
    """`start_world`, and at the end `stop_world`. A rank that raises says why first, then ends all the others.

    Without this a rank that raised would leave the others in a collective until its timeout of half an hour.
    """
    if "MASTER_ADDR" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield start_world(device)
        stop_world()
        return
    rank = int(os.environ["RANK"])
    with _meeting(rank):  # a client of its own: the process group's may be busy in a blocking call
        store = _words_store(COLLECTIVE_TIMEOUT)
    _start_watching(store, rank)  # before the others are waited for: one may have failed already
    try:
        with _meeting(rank):
            world = start_world(device)
        yield world
    except Exception as error:
        _fail(error, store, rank)
    stop_world()


@contextlib.contextmanager
def _meeting(rank: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise EnvironmentFault(
            f"rank {rank} could not meet the others ({error}); for the network's settings see "
            "docs/how-to/several-machines.md"
        ) from None


def tell_other_hosts() -> None:
    """Before a process group exists: tell the processes of other hosts, which wait for this one, that it has failed.

    Says nothing and gives up after 20 seconds where nobody listens: they have failed too.
    """
    where = os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", "0"))
    deadline = time.monotonic() + _TELL.total_seconds()
    while time.monotonic() < deadline:
        with contextlib.suppress(Exception), socket.create_connection(where, timeout=1.0):
            _first_failure(_words_store(_TELL), int(os.environ["RANK"]), wait=False)
            return
        time.sleep(0.5)


def _words_store(timeout: datetime.timedelta) -> Any:
    """Where the ranks leave word of a failure."""
    return torch.distributed.distributed_c10d.PrefixStore(
        "wikift", next(iter(rendezvous("env://", timeout=timeout)))[0]
    )


def _local_place() -> tuple[int, int]:
    """(rank, number of ranks) on this host."""
    size = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE", "1")
    return int(os.environ.get("LOCAL_RANK", "0")), int(size)


def _device(requested: str, local_rank: int, local_size: int) -> torch.device:
    if requested == "cpu":
        return torch.device("cpu")
    if requested == "auto" and not torch.cuda.is_available():
        if torch.version.cuda and _NVIDIA_DRIVER.exists() and "CUDA_VISIBLE_DEVICES" not in os.environ:
            raise UserError(
                f"--device auto: there is an NVIDIA driver, but torch {torch.__version__} cannot use it (most often it "
                f"is older than CUDA {torch.version.cuda}); update the driver, install a torch for an older CUDA "
                "(https://pytorch.org/get-started/locally), or take --device cpu"
            )
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            "--device cuda: torch sees no CUDA device here; use --device cpu, or install a CUDA build of torch"
        )
    if local_size > torch.cuda.device_count():
        raise UserError(
            f"--nproc_per_node {local_size}: this host has {torch.cuda.device_count()} CUDA devices, one for each "
            "process at most; start fewer processes (deepspeed: --num_gpus, slots in the hostfile) or use --device cpu"
        )
    device = torch.device("cuda", local_rank)
    built_for = [int(arch[3:].rstrip("af")) for arch in torch.cuda.get_arch_list() if arch.startswith("sm_")]
    major, minor = torch.cuda.get_device_capability(device)
    if built_for and 10 * major + minor < min(built_for):
        raise UserError(
            f"--device {requested}: this torch has no code for {torch.cuda.get_device_name(device)}, of compute "
            f"capability {major}.{minor}, but from {min(built_for) / 10} on; install a torch for an older CUDA "
            "(https://pytorch.org/get-started/locally), or take --device cpu"
        )
    torch.cuda.set_device(device)
    return device


def _start_watching(store: Any, rank: int) -> None:
    """A thread that ends this process when another rank has failed, and stops it gently when the launcher is gone."""
    parent = os.getppid()

    def watch() -> None:
        while True:
            time.sleep(1.0)
            if os.getppid() != parent:  # torchrun was killed: an orphan would train on, unseen
                os.kill(os.getpid(), signal.SIGTERM)
                return
            with contextlib.suppress(Exception):  # a store that is gone is what the main thread reports
                if (failed := _failed_rank(store)) not in (None, rank):
                    time.sleep(_GRACE_SECONDS)  # the main thread has left by then, unless it waits without end
                    print(f"wikift: rank {rank} stops, rank {failed} failed", file=sys.stderr, flush=True)
                    os._exit(EXIT_FAULT)

    threading.Thread(target=watch, name="wikift-watch", daemon=True).start()


def _failed_rank(store: Any) -> int | None:
    return int(store.get(_FAILED)) if store.check([_FAILED]) else None


def _fail(error: Exception, store: Any, rank: int) -> NoReturn:
    """Say why, tell the others, leave at once: destructors of a broken process group may wait for ever."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher that notices too must not end it before it has spoken
    # A lost peer has a cause elsewhere, and a wrong setting is wrong on every rank: let the one speak that knows.
    secondary = _is_lost_peer(error) or (isinstance(error, (UserError, EnvironmentFault)) and rank != 0)
    first = _first_failure(store, rank, wait=secondary)
    if _is_lost_peer(error) and first is None:
        print(
            f"wikift: rank {rank} lost another process, which left no word (killed, or out of memory?); "
            "run the same command again to go on from the newest checkpoint",
            file=sys.stderr,
        )
    elif first not in (None, rank):
        if not isinstance(error, (UserError, EnvironmentFault)):
            print(f"wikift: rank {rank} stops, rank {first} failed", file=sys.stderr)
    elif isinstance(error, UserError):
        report(error)
    elif isinstance(error, EnvironmentFault):
        print(f"wikift: {error}", file=sys.stderr)
    else:
        print(f"wikift: rank {rank} failed:\n{traceback.format_exc()}", file=sys.stderr, end="")
    sys.stdout.flush()
    sys.stderr.flush()
    if first != rank:
        time.sleep(1.0)  # the launcher names the rank that left first as the cause
    os._exit(EXIT_USER if isinstance(error, UserError) else EXIT_FAULT)


def _first_failure(store: Any, rank: int, *, wait: bool) -> int | None:
    """The rank that failed first, this one where it does not `wait` for another's word; None where none said so."""
    deadline = time.monotonic() + (_GRACE_SECONDS if wait else 0.0)
    try:
        while (first := _failed_rank(store)) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if first is None:
            store.set(_FAILED, str(rank))
            first = None if wait else rank
        return first
    except Exception:  # the store went with its host
        return None if wait else rank


def _is_lost_peer(error: Exception) -> bool:
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
