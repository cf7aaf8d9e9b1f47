"""Stand-ins for torch.cuda, for the choice of attention's kernel, and for the other ranks."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.cuda.seen import Seen

DEVICE = torch.device("cuda", 0)
MEMORY = 80 * 2**30
_SOURCE = Path(__file__).with_name("guard.cpp")


def built_guard() -> Path:
    """guard.cpp, compiled once for this torch. Raises OSError where there is no g++."""
    lib = Path(tempfile.gettempdir()) / f"wikift-tests-{os.getuid()}" / f"guard-{torch.__version__}.so"
    if not lib.exists() or lib.stat().st_mtime < _SOURCE.stat().st_mtime:
        lib.parent.mkdir(exist_ok=True)
        root, new = Path(torch.__file__).parent, lib.with_suffix(f".{os.getpid()}")
        start = ["g++", "-O0", "-std=c++20", "-fPIC", "-shared", f"-I{root}/include", str(_SOURCE), "-o", str(new)]
        subprocess.run([*start, f"-L{root}/lib", "-lc10", "-ltorch_cpu"], check=True)
        new.replace(lib)
    return lib


def pretend_cuda(seen: Seen) -> None:
    class Stream:
        device, stream_id, device_index, device_type = DEVICE, 0, 0, 1

        def __init__(self, *_: Any, **__: Any) -> None: ...
        def __enter__(self) -> Stream:
            return self

        def __exit__(self, *_: object) -> None: ...
        def wait_stream(self, stream: Any) -> None: ...
        def wait_event(self, event: Any) -> None: ...
        def record_event(self, event: Any = None) -> Any:
            return event or Event()

        def synchronize(self) -> None:
            seen.wait("stream.synchronize")

        def query(self) -> bool:
            return True

    class Event:
        def __init__(self, *_: Any, **__: Any) -> None: ...
        def record(self, stream: Any = None) -> None: ...
        def wait(self, stream: Any = None) -> None: ...
        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            seen.wait("event.synchronize")

        def elapsed_time(self, event: Any) -> float:
            return 1.0

    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=MEMORY, major=9, minor=0, uuid="GPU-0")
    properties.multi_processor_count, properties.L2_cache_size, properties.gcnArchName = 132, 50 * 2**20, ""
    properties.warp_size, properties.max_threads_per_multi_processor = 32, 2048
    properties.regs_per_multiprocessor = 2**16
    nothing = "_lazy_init init set_device reset_peak_memory_stats empty_cache set_stream manual_seed manual_seed_all"
    yes = "is_available is_initialized is_bf16_supported can_device_access_peer"
    values = {
        **dict.fromkeys((*nothing.split(), "set_rng_state")),
        **dict.fromkeys(yes.split(), True),
        "device_count": 8,
        "current_device": 0,
        "get_device_name": properties.name,
        "get_device_properties": properties,
        "get_device_capability": (9, 0),
        "get_arch_list": ["sm_80", "sm_90"],
        "memory_stats": defaultdict(int),
        "current_stream": Stream(),
        "default_stream": Stream(),
        "is_current_stream_capturing": False,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
    }
    for name, value in values.items():
        setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    torch.cuda.stream = torch.cuda.device = contextlib.nullcontext  # type: ignore[misc, assignment]
    for name in ("memory_allocated", "memory_reserved"):
        setattr(torch.cuda, name, lambda *_: seen.now)
        setattr(torch.cuda, f"max_{name}", lambda *_: max(part.most for part in seen.parts))
    torch.cuda.mem_get_info = lambda *_: (MEMORY - seen.now, MEMORY)
    torch.cuda.synchronize = lambda *_: seen.wait("cuda.synchronize")
    torch.cuda.Stream = torch.cuda.ExternalStream = Stream  # type: ignore[misc, assignment]
    torch.cuda.Event = Event  # type: ignore[misc, assignment]
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, lambda *_, **__: None)
    torch.Tensor.record_stream = lambda tensor, stream: None  # type: ignore[method-assign, assignment]
    _choose_attention()

    to = torch.nn.Module.to

    def moved(module: torch.nn.Module, *where: Any, **how: Any) -> torch.nn.Module:
        """A module of fake tensors is moved by swapping them, which fails where one is referenced: if need be only."""
        device, dtype, _, _ = torch._C._nn._parse_to(*where, **how)
        stays = all(device in (None, p.device) and dtype in (None, p.dtype) for p in module.parameters())
        return module if stays else to(module, *where, **how)

    torch.nn.Module.to = moved  # type: ignore[method-assign, assignment]


def _choose_attention() -> None:
    """C++ chooses by what the build has: flash for half precision without a mask, else the memory-efficient one."""
    real, aten = torch.nn.functional.scaled_dot_product_attention, torch.ops.aten

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if query.device.type != "cuda":
            return real(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
        if torch.is_autocast_enabled("cuda"):
            query, key, value = (part.to(torch.get_autocast_dtype("cuda")) for part in (query, key, value))
        if attn_mask is None and query.dtype != torch.float32:
            return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
        if attn_mask is not None:
            attn_mask = torch.zeros(attn_mask.shape, dtype=query.dtype, device=query.device)
            attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, query.requires_grad, dropout_p, is_causal, scale=scale
        )[0]

    torch.nn.functional.scaled_dot_product_attention = attention


def pretend_ranks(rank: int, ranks: int) -> None:
    """One rank alone: whoever meets the others meets nobody, and gets its own numbers back."""
    from deepspeed.accelerator import real_accelerator
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator  # type: ignore[import-not-found]
    from torch.testing._internal.distributed.fake_pg import FakeStore

    begin = dist.init_process_group

    def init(backend: str = "", **_: Any) -> None:
        assert "nccl" in backend, backend
        begin("fake", store=FakeStore(), rank=rank, world_size=ranks)

    dist.init_process_group = init
    dist.is_nccl_available = lambda: True
    store = _Alone()
    # by name: as an attribute it is hidden by the function
    sys.modules["torch.distributed.rendezvous"].TCPStore = lambda *_, **__: store  # type: ignore[attr-defined]
    dist._verify_params_across_processes = lambda *_: None  # compares the ranks' numbers
    real_accelerator.set_accelerator(CUDA_Accelerator())


class _Alone(dist.Store):
    """A store that nobody waits at: what other ranks would have written is its key."""

    def __init__(self) -> None:
        super().__init__()
        self.written: dict[str, Any] = {}

    def set(self, key: str, value: Any) -> None:
        self.written[key] = value

    def get(self, key: str) -> Any:
        return self.written.get(key, key.encode())

    def check(self, keys: list[str]) -> bool:
        return all(key in self.written for key in keys)
