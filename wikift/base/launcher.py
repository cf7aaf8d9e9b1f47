"""What the launcher told this process: its rank, of how many, and where they meet. The only reader of these variables.

torchrun, deepspeed and `accelerate launch` set the first row's; mpirun and a bare `srun` have names of their own.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from wikift.base.errors import EnvironmentFault, UserError

# Names of the rank, the number of ranks, the rank on this host and the number of ranks there; the first that is set.
_USUAL = ("RANK", "WORLD_SIZE", "LOCAL_RANK SLURM_LOCALID", "LOCAL_WORLD_SIZE LOCAL_SIZE")
_NAMES = (
    _USUAL,
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID SLURM_LOCALID", "MPI_LOCALNRANKS"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS SLURM_NTASKS", "SLURM_LOCALID", ""),
)
# What accelerate asks for by the environment: its default, and the setting that does the same.
_ACCELERATE = {
    "ACCELERATE_MIXED_PRECISION": ("no", "--precision"),
    "ACCELERATE_USE_CPU": ("false", "--device cpu"),
    "ACCELERATE_USE_FSDP": ("false", "--engine fsdp"),
    "ACCELERATE_USE_DEEPSPEED": ("false", "--deepspeed"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "--compile"),
}

_ENDED_SECONDS = 20.0  # until a launcher that cannot be reached has ended


@dataclass(frozen=True)
class Launch:
    """`rank` of `size`, `local_rank` (None where it is not known) of `local_size` on its host.

    `address` is rank 0's, HOST:PORT; empty without a launcher. torchrun restarts failing ranks at most `restarts`
    times, and has done so `restarted` times.
    """

    rank: int = 0
    size: int = 1
    local_rank: int | None = None
    local_size: int = 1
    address: str = ""
    started: bool = False  # by a launcher: others may wait for this process
    restarts: int = 0
    restarted: int = 0


def launch() -> Launch:
    """What the environment says. Raises UserError where that makes no sense."""
    env = os.environ
    names = next((row for row in _NAMES if env.get(row[0])), None)
    # a batch script itself has a rank among tasks that nobody started
    if names is None or (
        names[0] == "SLURM_PROCID" and env.get("ENVIRONMENT") == "BATCH" and "SLURM_STEP_ID" not in env
    ):
        if (_number("WORLD_SIZE") or 1) > 1:
            size_set = f"WORLD_SIZE {env['WORLD_SIZE']}"
            raise UserError(f"{size_set}: is set in the environment, RANK is not; start with torchrun, or unset it")
        if "MASTER_ADDR" in env and "ACCELERATE_MIXED_PRECISION" in env:
            raise UserError(
                "accelerate launch --num_processes: started one process, as it leaves CPUs to mpirun; use "
                "accelerate launch --multi_gpu (on CPUs too), or torchrun --nproc_per_node=N"
            )
        return Launch(local_rank=_number("LOCAL_RANK"))
    rank, size, local_rank, local_size = (_number(text) for text in names)
    rank, size, local_size = rank or 0, size or 1, local_size or _tasks_here(size or 1)
    if rank >= size:
        raise UserError(f"{names[0]} {rank}: must be below the number of processes, {size}; the launcher sets both")
    if names == _USUAL:
        host = env.get("MASTER_ADDR", "")
    elif size == 1:
        return Launch()
    else:
        host = env.get("MASTER_ADDR") or ("127.0.0.1" if local_size == size else _first_host())
    job = env.get("SLURM_JOB_ID", "") if names != _USUAL else ""
    port = 15000 + (int(job) + 7 * (_number("SLURM_STEP_ID") or 0)) % 15000 if job.isdecimal() else 29500
    address = f"{f'[{host}]' if ':' in host else host}:{env.get('MASTER_PORT', port)}" if host else ""
    restarts, restarted = (_number(f"TORCHELASTIC_{name}") or 0 for name in ("MAX_RESTARTS", "RESTART_COUNT"))
    return Launch(rank, size, local_rank, local_size, address, True, restarts, restarted)


def end_restarts(here: Launch) -> None:
    """Where a restart has no use: ask torchrun to end, which restarts its ranks whatever their exit code."""
    if here.restarts and not here.local_rank:
        os.kill(os.getppid(), signal.SIGTERM)


def name_of_start(store: Any, here: Launch, seconds: float) -> str:
    """A name that all ranks of this start share: torchrun's store keeps what those before a restart wrote.

    Rank 0 makes it, and hands it to each rank under a key that nobody has used before. Raises RuntimeError where one
    does not come.
    """
    own, deadline = uuid.uuid4().hex, time.monotonic() + seconds
    if here.rank:
        store.set(f"wikift/rank/{here.rank}", own)
        name = str(store.get(own).decode())
        store.set(f"{name}/{here.rank}", "has it")
        return name
    missing = set(range(1, here.size))
    while missing:
        for rank in missing:
            if store.check([f"wikift/rank/{rank}"]):  # it may be one of a start before: its answer is read by nobody
                store.set(store.get(f"wikift/rank/{rank}").decode(), own)
        missing = {rank for rank in missing if not store.check([f"{own}/{rank}"])}
        if time.monotonic() > deadline:
            raise RuntimeError(f"rank {min(missing)} did not come within {seconds:g} s")
        time.sleep(0.02)
    return own


def reach_store(address: str) -> None:
    """torchrun's store is there before its ranks: where it cannot be reached torchrun has ended, and a rank is left."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + _ENDED_SECONDS
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5.0).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise EnvironmentFault(
                    f"torchrun's store, {address}, cannot be reached ({error}): torchrun has ended; run it again"
                ) from None
        time.sleep(0.5)


@contextlib.contextmanager
def meeting(rank: int) -> Iterator[None]:
    """Within, a rank that the others wait for too long is a message: it has ended, or cannot be reached."""
    try:
        yield
    except RuntimeError as error:
        raise EnvironmentFault(
            f"rank {rank} could not meet the others ({error}); has one ended? For the network's settings see "
            "docs/how-to/several-machines.md"
        ) from None


def unused_settings() -> list[str]:
    """What `accelerate launch` or its config file asked for, which has no effect here, with the setting that has."""
    asked = {name: os.environ.get(name, default) for name, (default, _) in _ACCELERATE.items()}
    return [
        f"{name} {value} (here {_ACCELERATE[name][1]})"
        for name, value in asked.items()
        if value.lower() != _ACCELERATE[name][0]
    ]


def _number(names: str) -> int | None:
    name = next((name for name in names.split() if os.environ.get(name)), None)
    if name is None:
        return None
    text = os.environ[name]
    if not text.isdecimal() or ("SIZE" in name and not int(text)):
        rule = "the number of processes" if "SIZE" in name else "a number"
        raise UserError(f"{name} {text}: must be {rule}; let the launcher set it (torchrun), or unset it")
    return int(text)


def _tasks_here(size: int) -> int:
    """How many of `size` tasks srun started on this host: the entry of this host in `2(x3),1`."""
    text = os.environ.get("SLURM_STEP_TASKS_PER_NODE") or os.environ.get("SLURM_TASKS_PER_NODE", "")
    counts = [int(n) for n, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text) for _ in range(int(times or 1))]
    node = _number("SLURM_NODEID") or 0
    return counts[node] if node < len(counts) else size if re.fullmatch(r"[^,[]+", _hosts()) else 1


def _hosts() -> str:
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    return next((os.environ[name] for name in names if os.environ.get(name)), "")


def _first_host() -> str:
    """The host of rank 0: `node01` of `node[01-03,07],other`."""
    if not _hosts():
        raise UserError("MASTER_ADDR: is not set; it is to name the host of rank 0 (mpirun -x MASTER_ADDR=HOST)")
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", _hosts()).partition(",")[0]
