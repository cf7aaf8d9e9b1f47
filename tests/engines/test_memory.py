"""No rank holds what it need not: the peak memory of four real ranks.

pytest tests/engines/test_memory.py
"""

from __future__ import annotations

import ctypes
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines.test_build import WORK
from tests.ranks import run_ranks
from tests.tiny_engines import make_engine
from wikift.base.errors import EnvironmentFault
from wikift.base.work import Choice
from wikift.base.world import World
from wikift.engines import memory
from wikift.engines.memory import available_bytes, explained, host_bytes

RANKS = 4
# deep, and its vocabulary small, so that no single tensor is more than a twentieth of the model
SHAPES = {
    kind: {
        "n_layer": 26, "n_head": width // 64, "n_embd": width, "n_positions": 64, "vocab_size": 16 * width,
        "bos_token_id": 0, "eos_token_id": 0,
    }
    for kind, width in {"fsdp": 512, "zero3": 1024}.items()  # DeepSpeed's own buffers would be too much of a small one
}  # fmt: skip


def resident(name: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most since `forget_peak`."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def give_back_what_is_freed() -> None:
    """Let glibc map tensors each by itself, so that what is measured is what is held and not what was."""
    threshold = -3  # M_MMAP_THRESHOLD of malloc.h
    assert ctypes.CDLL(None).mallopt(threshold, 1 << 20)


def train_one_step(kind: str, folder: str) -> tuple[int, int, int]:
    """On one rank: (peak bytes, bytes of its share, bytes read) of an engine made, filled from a file and trained."""
    from wikift.base.world import start_world
    from wikift.checkpoint.fragment import FreshStart
    from wikift.model.gpt2 import model_config
    from wikift.model.initial_weights import trained_weights
    from wikift.settings import deepspeed as dsconfig

    world = start_world("cpu")
    config = model_config(SHAPES[kind])
    # two blocks, as `most` has it; the 150M elements of the file are a third of this model
    live = {"zero_optimization.stage3_max_live_parameters": 2 * 12 * SHAPES[kind]["n_embd"] ** 2}
    ds_config = {**dsconfig.read("zero3")[0], **live}
    give_back_what_is_freed()
    forget_peak()
    before = resident("VmRSS")
    engine = make_engine(kind, world, config, ds_config=ds_config)
    read_before = bytes_read()
    engine.restore(FreshStart(trained_weights(folder, config, "--model", print).read))
    read = bytes_read() - read_before
    for _ in range(2):  # from the second on ZeRO-3 fetches ahead
        engine.forward_backward(torch.zeros(1, 9, dtype=torch.int64), last=True)
        engine.step(1e-4)
    share = sum(4 * fragment.data.numel() for fragment in engine.fragments())
    return resident("VmHWM") - before, share, read


def bytes_read() -> int:
    """What this process has asked the kernel for, from files and pipes."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


@pytest.fixture
def model(tmp_path: Path, kind: str) -> Path:
    """A Hugging Face folder of the kind's shape whose weights are the zeros of a sparse file."""
    from wikift.model.gpt2 import make_model, model_config, parameter_shapes

    folder = tmp_path
    config = model_config(SHAPES[kind])
    with torch.device("meta"):
        shapes = parameter_shapes(make_model(config))
    config.save_pretrained(folder)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        size = 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return folder


PARAMETERS = {"fsdp": 86_190_080, "zero3": 344_346_624}
# Bytes a parameter, divided by the ranks: weights, two moments and gradients; DeepSpeed keeps a second fp32 copy of the
# weights to compute with, also where they are fp32 already
STATE = {"fsdp": 16, "zero3": 20}


def most(kind: str) -> float:
    """The state, a tenth, and what is whole for a moment: the embedding, the block at work and the next, gradients."""
    largest = 4 * SHAPES[kind]["vocab_size"] * SHAPES[kind]["n_embd"]  # bytes
    return 1.1 * STATE[kind] * PARAMETERS[kind] / RANKS + 6 * largest


@pytest.mark.parametrize("kind", ["fsdp", pytest.param("zero3", marks=pytest.mark.long)])
def test_a_rank_holds_its_share_and_reads_its_share(model: Path, kind: str) -> None:
    for peak, share, read in run_ranks(train_one_step, RANKS, kind, str(model), timeout_seconds=300):
        print(kind, peak / 1e9, share / 1e9, read / 1e9)
        assert share == pytest.approx(12 * PARAMETERS[kind] / RANKS, rel=0.01)
        assert peak < most(kind)
        assert read < 4 * PARAMETERS[kind] / RANKS * 1.01 + 1e6


def test_available_is_what_the_host_and_each_control_group_leaves(tmp_path: Path) -> None:
    def write(name: str, content: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)

    assert host_bytes(tmp_path) == 1 << 60  # nobody tells
    write("proc/meminfo", "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    assert host_bytes(tmp_path) == 8000 * 1024
    write("proc/self/cgroup", "4:cpu,cpuacct:/\n0::/job/rank\n")
    for group, limit, used in (("job", "6000000", 3000000), ("job/rank", "max", 2000000)):
        write(f"sys/fs/cgroup/{group}/memory.max", limit)
        write(f"sys/fs/cgroup/{group}/memory.current", f"{used}\n")
        write(f"sys/fs/cgroup/{group}/memory.stat", "anon 7\nactive_file 10000\ninactive_file 500000\n")
    assert host_bytes(tmp_path) == 6000000 - 3000000 + 510000  # of the group above; a cache is given back
    write("proc/self/cgroup", "9:memory:/docker/1a2b\n0::/\n")  # the path outside of a container
    write("sys/fs/cgroup/memory/memory.limit_in_bytes", "4000000")
    write("sys/fs/cgroup/memory/memory.usage_in_bytes", "1000000")
    write("sys/fs/cgroup/memory/memory.stat", "total_active_file 1\ntotal_inactive_file 2\nactive_file 99\n")
    assert host_bytes(tmp_path) == 3000003


TORCHS = (
    "CUDA out of memory. Tried to allocate 2.25 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.02 GiB is free"
)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError(f"{TORCHS}. Process 7 has 3.00 GiB in use."), f"({TORCHS}). By estimate"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "cublasCreate"),
    ],
)
def test_out_of_memory_keeps_torchs_numbers_and_says_what_takes_less(
    error: RuntimeError, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the estimate that `wikift plan` prints; the micro-batch divides what a rank computes in a step."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (70 * 10**9, 80 * 10**9))
    monkeypatch.setattr(memory, "gpu_bytes", lambda _: 80 * 10**9)
    world = World(0, 2, device=torch.device("cuda", 0))
    assert available_bytes(world) == 70 * 10**9  # what is free, not what there is
    work = replace(WORK, engine=Choice("ddp", ""), micro_batch=12, accumulation=1)
    with pytest.raises(EnvironmentFault) as told, explained(work, world):
        raise error
    text = str(told.value)
    assert text.startswith("NVIDIA H100 is out of memory (")
    assert reason in text
    ways = re.findall(r"(--[a-z-]+(?: \w+)?) \((\d+\.\d+) GB\)", text)
    names = ["--per-device-train-batch-size 6", "--gradient-checkpointing", "--engine fsdp", "--block-size 256",
             "--model distilgpt2"]  # fmt: skip
    assert [name for name, _ in ways] == names
    (need,) = re.findall(r"takes (\d+\.\d+) GB per process", text)
    assert all(float(size) < float(need) for _, size in ways)


def test_another_error_stays_itself() -> None:
    with pytest.raises(RuntimeError, match="shapes"), explained(WORK, World()):
        raise RuntimeError("shapes do not fit")
