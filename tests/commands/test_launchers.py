"""Both launchers and every file of ds_configs/, as a user types them: the losses are DDP's, and nobody else speaks."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch

from tests.ranks import run_ranks
from tests.tiny import arguments, metrics, tiny_store, train
from wikift.base import world
from wikift.base.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TRAIN = str(ROOT / "launch" / "train.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--num_gpus=2"]
SECONDS = 180  # ten on two idle cores
TOLERANCE = 1e-5
NOISE = r"\[W.*(?:The hostname of the client socket cannot be retrieved|Unable to resolve hostname).*"  # torch's
PHASE = r".* (\.\.\.|took \d+ s)$|  first step: micro-batch .*"  # of what lasts, on a busy machine
# what a run of four steps says on a terminal, from the first line to the last
WORDS = (
    "wikift ",
    "gpt2 from scratch: ", "engine ", "fp32 on cpu (", "8 blocks per step = 2 processes x ", "memory: about ",
    "step 1/4  loss ", "step 2/4  loss ", "step 3/4  loss ", "step 4/4  loss ", "memory: ", "done: ", "  {} ", "  {} ",
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
    plain = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
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


def check(run: Path, ddp: Path, output: str, engine: str, form: str = f"python {ROOT}/launch/{{}}.py") -> None:
    """`form` is how the next commands are written: as this one was typed."""
    words = [*WORDS[:-2], *(f"  {form.format(name)} " for name in ("consolidate", "generate"))]
    lines = [text for text in output.splitlines() if not re.match(f"{NOISE}|{PHASE}", text)]
    assert [text for text, word in zip(lines, words, strict=True) if not text.startswith(word)] == [], output
    assert lines[2].startswith(f"engine {engine} (")
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


FILES = [
    pytest.param(path.stem, marks=[] if path.stem in ("zero2", "zero3") else [pytest.mark.long])
    for path in sorted((ROOT / "ds_configs").glob("*.json"))
]
LAUNCHERS = {"zero2": DEEPSPEED, "zero3_offload": TORCHRUN}  # the others in the ranks of tests.ranks


@pytest.mark.parametrize("name", FILES)
def test_every_file_trains_as_ddp_does(folder: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    words = words_of(folder, name, deepspeed=ROOT / "ds_configs" / f"{name}.json")
    if name in LAUNCHERS:
        check(folder / name, folder / "ddp", launched(LAUNCHERS[name], words), name.partition("_")[0])
    else:
        assert run_ranks(train, 2, words) == [0, 0]
        check(folder / name, folder / "ddp", capfd.readouterr().out, name.partition("_")[0], form="wikift {}")


@pytest.mark.parametrize("engine", ["ddp", pytest.param("zero3", marks=pytest.mark.long)])
def test_a_bare_srun_trains_as_torchrun_does(folder: Path, engine: str) -> None:
    output = srun(words_of(folder, f"srun-{engine}", deepspeed=None if engine == "ddp" else engine))
    check(folder / f"srun-{engine}", folder / "ddp", output, engine)


@pytest.mark.parametrize("name", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_the_cores_of_a_host_are_shared_out_under_both_launchers(name: str) -> None:
    """Two ranks of four here: torchrun's name for their number, and that of DeepSpeed's launcher."""
    cores = len(os.sched_getaffinity(0))
    for local_size, threads in run_ranks(local_places, 2, name, str(cores)):
        assert (local_size, threads) == (cores, 1)


def local_places(name: str, value: str) -> tuple[int, int]:
    del os.environ["LOCAL_WORLD_SIZE"]
    os.environ[name] = value
    torch.set_num_threads(3)
    return world.start_world("cpu").local_size, torch.get_num_threads()


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., torch.device]:
    """The device that a rank takes, in an environment and with what torch says of the host's GPUs."""

    def device(environment: dict[str, str], **facts: Any) -> torch.device:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        facts = {"is_available": True, "device_count": 2, "set_device": None, **facts}
        for name, fact in facts.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, fact=fact: fact)
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        return world.start_world("auto").device

    return device


RANK = {"RANK": "1", "WORLD_SIZE": "3"}
TASK = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1", "SLURM_NODELIST": "node7"}


def test_a_rank_takes_the_gpu_of_its_number_or_its_own(gpus: Callable[..., torch.device]) -> None:
    assert gpus({**RANK, "LOCAL_RANK": "1"}) == torch.device("cuda", 1)
    assert gpus({**TASK, "SLURM_LOCALID": "3"}, device_count=1) == torch.device("cuda", 0)
    assert gpus(RANK, device_count=1) == torch.device("cuda", 0)


def met_on_gpus(uuids: list[str]) -> str:
    """What a rank is told whose GPU has the UUID of its number, where each sees one GPU; the backend, if nothing."""
    own = torch.distributed.distributed_c10d
    store, init = own.PrefixStore("gpus", own._get_default_store()), Mock()
    properties = SimpleNamespace(uuid=uuids[int(os.environ["RANK"])])
    facts = {"is_available": True, "device_count": 1, "set_device": None}
    with (
        patch.multiple(torch.cuda, **{name: Mock(return_value=fact) for name, fact in facts.items()}),
        patch.multiple(torch.cuda, get_device_properties=lambda _: properties),
        patch.multiple(torch.distributed, is_initialized=lambda: False, init_process_group=init),
        patch.object(world, "shared_store", lambda *_: store),
    ):
        try:
            world.start_world("cuda")
        except UserError as error:
            return str(error)
    return str(init.call_args.args[0])


def test_ranks_that_share_a_gpu_are_named() -> None:
    assert run_ranks(met_on_gpus, 3, ["a", "b", "c"]) == ["cpu:gloo,cuda:nccl"] * 3
    for told in run_ranks(met_on_gpus, 3, ["a", "b", "a"]):
        assert told.startswith("--nproc_per_node 3: needs a GPU for each process, ranks 0, 2 share one; start fewer")


def test_a_gpu_that_cannot_be_used_is_told(
    gpus: Callable[..., torch.device], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    with pytest.raises(UserError, match="LOCAL_RANK: is not set beside RANK"):
        gpus(RANK)
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(world, "_NVIDIA_DRIVER", tmp_path / "nvidiactl")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(UserError, match=r"--device auto: there is an NVIDIA driver.*than CUDA 13.0.*--device cpu"):
        gpus({}, is_available=False)
    assert gpus({"CUDA_VISIBLE_DEVICES": ""}, is_available=False).type == "cpu", "the user hid it"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert gpus({}, is_available=False).type == "cpu"
    assert "is a build for CPUs, the NVIDIA GPU here is not used; pip uninstall torch" in capsys.readouterr().err


@pytest.mark.parametrize("asked", [{}, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, {"PYTORCH_ALLOC_CONF": ""}])
def test_the_allocators_segments_grow_unless_the_user_asks_for_something(
    gpus: Callable[..., torch.device], asked: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # as it was, after the test
        monkeypatch.delenv(name)
    gpus({"RANK": "0", "LOCAL_RANK": "0", **asked})
    assert os.environ.get("PYTORCH_ALLOC_CONF") == asked.get(
        "PYTORCH_ALLOC_CONF", None if asked else "expandable_segments:True"
    )
