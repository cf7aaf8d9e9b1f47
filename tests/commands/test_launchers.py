"""Both launchers and every file of ds_configs/, as a user types them: the losses are DDP's, and nobody else speaks.

pytest tests/commands/test_launchers.py
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.tiny import arguments, metrics, tiny_store

ROOT = Path(__file__).resolve().parents[2]
TRAIN = str(ROOT / "launch" / "train.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--num_gpus=2"]
SECONDS = 180  # ten on two idle cores
TOLERANCE = 1e-5
NOISE = r"\[W.*(?:The hostname of the client socket cannot be retrieved|Unable to resolve hostname).*"  # torch's
# what a run of four steps says on a terminal, from the first line to the last
WORDS = (
    "gpt2 from scratch: ", "engine ", "fp32 on cpu (", "8 blocks per step = 2 processes x ", "step 1/4  loss ",
    "step 2/4  loss ", "step 3/4  loss ", "step 4/4  loss ", "done: ", "  {} ", "  {} ",
)  # fmt: skip


def words_of(folder: Path, name: str, **settings: Any) -> list[str]:
    return arguments(folder / "store", folder / name, max_steps=4, dropout=0.0, quiet=False, **settings)


def launched(launcher: list[str], words: list[str]) -> str:
    """Everything that comes to the terminal."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([*launcher, TRAIN, *words], env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def srun(words: list[str]) -> str:
    """Two processes with what a bare `srun --ntasks=2` sets; the port follows from a job id of which it is free."""
    for job in range(os.getpid(), os.getpid() + 1000):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", 15000 + job % 15000)):
            break
    common = {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"}
    common |= {"SLURM_STEP_NODELIST": "node7", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0"}
    plain = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    plain |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    tasks = [
        subprocess.Popen(
            [sys.executable, TRAIN, *words],
            env={**plain, **common, "SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for n in range(2)
    ]  # fmt: skip
    try:
        outputs = [task.communicate(timeout=SECONDS)[0] for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    assert [task.returncode for task in tasks] == [0, 0], outputs
    return "".join(outputs)


def in_ranks(words: list[str]) -> None:
    from wikift.commands.train import main

    assert main(words) == 0


def check(run: Path, ddp: Path, output: str, engine: str, form: str = f"python {ROOT}/launch/{{}}.py") -> None:
    """`form` is how the next commands are written: as this one was typed."""
    words = [*WORDS[:-2], *(f"  {form.format(name)} " for name in ("consolidate", "generate"))]
    lines = [text for text in output.splitlines() if not re.match(NOISE, text)]
    assert [text for text, word in zip(lines, words, strict=True) if not text.startswith(word)] == [], output
    assert lines[1].startswith(f"engine {engine} (")
    for here, there in zip(metrics(run), metrics(ddp), strict=True):
        assert abs(here["loss"] - there["loss"]) <= TOLERANCE
        assert abs(here["grad_norm"] / there["grad_norm"] - 1) <= TOLERANCE
        assert abs(here.get("eval_loss", 0.0) - there.get("eval_loss", 0.0)) <= TOLERANCE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, and a run of torchrun under DDP beside it."""
    folder = tmp_path_factory.mktemp("launchers")
    tiny_store(folder / "store")
    output = launched(TORCHRUN, words_of(folder, "ddp"))
    check(folder / "ddp", folder / "ddp", output, "ddp")
    assert len(metrics(folder / "ddp")) == 4
    return folder


@pytest.mark.parametrize(
    ("launcher", "name"),
    [
        (DEEPSPEED, "zero2"),
        pytest.param(TORCHRUN, "zero3_offload", marks=pytest.mark.long),
        (None, "zero1"),
        pytest.param(None, "zero2_offload", marks=pytest.mark.long),
        (None, "zero3"),
    ],
    ids=["deepspeed-zero2", "torchrun-zero3_offload", "zero1", "zero2_offload", "zero3"],
)
def test_every_file_trains_as_ddp_does(
    folder: Path, launcher: list[str] | None, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    words = words_of(folder, name, deepspeed=ROOT / "ds_configs" / f"{name}.json")
    if launcher is None:
        run_ranks(in_ranks, 2, words)
        output = capfd.readouterr().out
    else:
        output = launched(launcher, words)
    form = {"form": "wikift {}"} if launcher is None else {}
    check(folder / name, folder / "ddp", output, name.partition("_")[0], **form)


@pytest.mark.parametrize("settings", [{}, {"deepspeed": "zero3"}], ids=["ddp", "zero3"])
def test_a_bare_srun_trains_as_torchrun_does(folder: Path, settings: dict[str, Any]) -> None:
    name = f"srun-{len(settings)}"
    output = srun(words_of(folder, name, **settings))
    check(folder / name, folder / "ddp", output, settings.get("deepspeed", "ddp"))


def test_every_file_is_among_them() -> None:
    (mark,) = [mark for mark in test_every_file_trains_as_ddp_does.pytestmark if mark.name == "parametrize"]  # type: ignore[attr-defined]
    assert {getattr(case, "values", case)[1] for case in mark.args[1]} == {
        path.stem for path in (ROOT / "ds_configs").glob("*.json")
    }


@pytest.mark.parametrize("name", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_the_cores_of_a_host_are_shared_out_under_both_launchers(name: str) -> None:
    """Two ranks of four here: torchrun's name for their number, and that of DeepSpeed's launcher."""
    cores = len(os.sched_getaffinity(0))
    for local_size, threads in run_ranks(local_places, 2, name, str(cores)):
        assert (local_size, threads) == (cores, 1)


def local_places(name: str, value: str) -> tuple[int, int]:
    import torch

    from wikift.base.world import start_world

    del os.environ["LOCAL_WORLD_SIZE"]
    os.environ[name] = value
    torch.set_num_threads(3)
    return start_world("cpu").local_size, torch.get_num_threads()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3"}, r"--nproc_per_node 3: this host has 2 CUDA devices.*--num_gpus"),
        ({}, "LOCAL_RANK: is not set beside RANK"),
    ],
)
def test_which_gpu_is_whose_must_be_known(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from wikift.base.errors import UserError
    from wikift.base.world import start_world

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=message):
        start_world("auto")


def test_a_task_of_srun_with_its_own_gpu_takes_that(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from wikift.base.world import start_world

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    facts = {"is_available": True, "device_count": 1, "get_arch_list": [], "set_device": None}
    for name, fact in {**facts, "get_device_capability": (9, 0)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *given, fact=fact: fact)
    task = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1", "SLURM_NODELIST": "node7"}
    for name, value in {**task, "SLURM_GPUS_PER_TASK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert start_world("auto").device == torch.device("cuda", 0)


@pytest.mark.parametrize("hidden", [False, True])
def test_a_driver_that_torch_cannot_use_is_said(hidden: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not trained on the CPU without a word, where the user hid no device."""
    import torch

    from wikift.base import world
    from wikift.base.errors import UserError

    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(world, "_NVIDIA_DRIVER", tmp_path / "nvidiactl")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert world.start_world("auto").device.type == "cpu"
    else:
        with pytest.raises(
            UserError, match=r"--device auto: there is an NVIDIA driver.*older than CUDA 13.0.*--device cpu"
        ):
            world.start_world("auto")


@pytest.mark.parametrize(("capability", "taken"), [((7, 0), False), ((7, 5), True), ((9, 0), True)])
def test_a_gpu_that_torch_has_no_code_for(
    capability: tuple[int, int], taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from wikift.base.errors import UserError
    from wikift.base.world import start_world

    facts = {
        "is_available": True, "device_count": 1, "get_arch_list": ["sm_75", "sm_90a", "compute_90"],
        "get_device_capability": capability, "get_device_name": "Tesla V100", "set_device": None,
    }  # fmt: skip
    for name, fact in facts.items():
        monkeypatch.setattr(torch.cuda, name, lambda *given, fact=fact: fact)
    if taken:
        assert start_world("auto").device == torch.device("cuda", 0)
    else:
        with pytest.raises(UserError, match=r"no code for Tesla V100, of compute capability 7.0, but from 7.5 on"):
            start_world("auto")
