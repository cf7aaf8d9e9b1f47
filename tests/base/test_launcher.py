"""What each launcher's environment means."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from wikift.base import launcher
from wikift.base.errors import EnvironmentFault, UserError
from wikift.base.launcher import Launch, launch, unused_settings
from wikift.base.world import first_on_each_host, shared_store

MASTER = {"MASTER_ADDR": "node1", "MASTER_PORT": "29501"}
STEP = {"SLURM_JOB_ID": "4243", "SLURM_STEP_ID": "1", "SLURM_STEP_NODELIST": "gpu[03-04,07],big"}
LAST_OF_SIX = {"SLURM_PROCID": "5", "SLURM_NTASKS": "6", "SLURM_LOCALID": "0", "SLURM_NODEID": "3"}
ONE_HOST = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1", "SLURM_NODELIST": "gpu03"}
OPENMPI = {f"OMPI_COMM_WORLD_{name}": value for name, value in (("RANK", "1"), ("SIZE", "2"), ("LOCAL_RANK", "1"))}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", **MASTER}


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    starts = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "OMPI_", "PMI_", "MPI_", "ACCELERATE_", "ENVIRON")
    for name in [name for name in os.environ if name.startswith(starts)]:
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Launch()),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "2"}, Launch(3, 4, 1, 2, "node1:29501", True)),
        ({**TORCHRUN, "LOCAL_SIZE": "2"}, Launch(3, 4, 1, 2, "node1:29501", True)),  # deepspeed
        ({**TORCHRUN, "MASTER_ADDR": "fe80::1"}, Launch(3, 4, 1, 1, "[fe80::1]:29501", True)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Launch(0, 1, None, 1, "", True)),
        ({"RANK": "1", "WORLD_SIZE": "2", "SLURM_LOCALID": "1", **MASTER}, Launch(1, 2, 1, 1, "node1:29501", True)),
        ({**STEP, **LAST_OF_SIX, "SLURM_STEP_TASKS_PER_NODE": "2(x2),1(x2)"}, Launch(5, 6, 0, 1, "gpu03:19250", True)),
        ({**STEP, **LAST_OF_SIX, **MASTER}, Launch(5, 6, 0, 1, "node1:29501", True)),
        (ONE_HOST, Launch(1, 2, 1, 2, "127.0.0.1:29500", True)),
        ({**ONE_HOST, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, Launch()),  # srun of one task, in a job of two
        ({**ONE_HOST, "ENVIRONMENT": "BATCH"}, Launch()),  # the batch script itself
        ({**ONE_HOST, "ENVIRONMENT": "BATCH", "SLURM_STEP_ID": "0"}, Launch(1, 2, 1, 2, "127.0.0.1:29500", True)),
        ({**ONE_HOST, **TORCHRUN, "LOCAL_WORLD_SIZE": "2"}, Launch(3, 4, 1, 2, "node1:29501", True)),  # srun torchrun
        ({**OPENMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, Launch(1, 2, 1, 2, "127.0.0.1:29500", True)),
    ],
)
def test_the_environment_of_each_launcher(
    clean: pytest.MonkeyPatch, environment: dict[str, str], expected: Launch
) -> None:
    for name, value in environment.items():
        clean.setenv(name, value)
    assert launch() == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE 0: must be the number of processes"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE -1: must be the number of processes"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE 2: is set in the environment, RANK is not"),
        ({"RANK": "first", "WORLD_SIZE": "2"}, "RANK first: must be a number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK 2: must be below the number of processes, 2"),
        ({**OPENMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "MASTER_ADDR: is not set"),
        ({"ACCELERATE_MIXED_PRECISION": "no", **MASTER}, "started one process.*accelerate launch --multi_gpu"),
    ],
)
def test_what_makes_no_sense(clean: pytest.MonkeyPatch, environment: dict[str, str], message: str) -> None:
    for name, value in environment.items():
        clean.setenv(name, value)
    with pytest.raises(UserError, match=message):
        launch()


def test_what_accelerate_was_asked_for_is_told(clean: pytest.MonkeyPatch) -> None:
    assert unused_settings() == []
    for name, value in {"MIXED_PRECISION": "bf16", "USE_FSDP": "true", "DYNAMO_BACKEND": "NO"}.items():
        clean.setenv("ACCELERATE_" + name, value)
    told = ["ACCELERATE_MIXED_PRECISION bf16 (here --precision)", "ACCELERATE_USE_FSDP true (here --engine fsdp)"]
    assert unused_settings() == told


def test_a_rank_whose_torchrun_has_ended_waits_for_nobody(clean: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        port = str(taken.getsockname()[1])
        for name, value in {**TORCHRUN, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            clean.setenv(name, value)
        clean.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        clean.setattr(launcher, "_ENDED_SECONDS", 0.0)
        with pytest.raises(EnvironmentFault, match=r"torchrun has ended; run it again"):
            shared_store("test")


def prepared(folder: Path, fails: bool) -> str:
    def work() -> None:
        if fails:
            raise ValueError("no disk")
        seen = " ".join(os.listdir(folder))
        (folder / f"by-{launch().rank}").write_text(seen)

    try:
        first_on_each_host(work, 60)
    except (ValueError, UserError) as error:
        return str(error)
    return "done"


def test_the_first_rank_of_a_host_prepares_and_tells_of_its_failure(tmp_path: Path) -> None:
    assert run_ranks(prepared, 2, tmp_path, False) == ["done", "done"]
    assert (tmp_path / "by-1").read_text() == "by-0"
    assert run_ranks(prepared, 2, tmp_path, True) == ["no disk", "rank 0 failed; see its message"]


def test_a_rank_that_ended_before_all_have_met_is_told(clean: pytest.MonkeyPatch) -> None:
    """In a bare srun, where no launcher ends those who wait."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        for name, value in {**ONE_HOST, "MASTER_PORT": str(silent.getsockname()[1])}.items():
            clean.setenv(name, value)
        with pytest.raises(EnvironmentFault, match=r"rank 1 could not meet the others .*has one ended"):
            first_on_each_host(lambda: None, 1)
