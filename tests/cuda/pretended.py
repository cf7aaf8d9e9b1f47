"""A GPU that is not there: the whole program runs on it, its tensors have a shape, a type and a device, and no numbers.

CPU tensors are real. Tensors on "cuda" are torch's FakeTensors, and what would make the host wait for a device
(`.item()`, `.cpu()`, a copy from memory that is not pinned, `synchronize`) is answered with zeros and recorded beside
the line that asked; so are collectives (each rank gets its own numbers back), operations, and the bytes that are held.
 A tensor that was left on the CPU raises, as on a GPU. Kernels, NCCL, streams' races and the allocator's
fragmentation stay unseen. In a process of its own (tests/ranks.py), for what is patched stays so.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
import tempfile
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

DEVICE = torch.device("cuda", 0)
MEMORY = 80 * 2**30
SMALL = 64  # bytes; norms, flags and losses lie below it, gradients and weights above
_SOURCE = Path(__file__).with_name("guard.cpp")
# operations that start no kernel, or have no counterpart on a GPU
_NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_"}
_NO_KERNEL |= {"_unsafe_view", "view", "_reshape_alias", "alias", "detach", "lift_fresh"}
_WAITS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "unique", "_unique2"}
_COLLECTIVES = (("reduce_scatter", "reduce_scatter"), ("allreduce", "all_reduce"), ("allgather", "all_gather"))


class Collective(NamedTuple):
    name: str  # all_reduce, all_gather, reduce_scatter, or torch's own name of another one
    bytes: int  # of the whole: what is reduced, or what has been gathered
    dtype: torch.dtype
    on_host: bool
    early: bool = False  # launched before the last gradient of the backward pass was made


@dataclass
class Part:
    """What was seen while `name` went on."""

    name: str
    waits: Counter[tuple[str, str]] = field(default_factory=Counter)  # (what was waited for, the line that asked)
    collectives: list[Collective] = field(default_factory=list)
    launches: int = 0
    most: int = 0  # bytes held at once

    def totals(self) -> dict[str, int]:
        return totals(self.collectives)


@dataclass
class Seen:
    """All that was seen, in parts that `begin` separates."""

    parts: list[Part] = field(default_factory=lambda: [Part("start")])
    now: int = 0  # bytes held

    def begin(self, name: str) -> None:
        self.parts.append(Part(name, most=self.now))

    @property
    def part(self) -> Part:
        return self.parts[-1]

    def wait(self, what: str) -> None:
        self.part.waits[what, _line()] += 1


def totals(collectives: list[Collective]) -> dict[str, int]:
    """Bytes of weights and gradients by the kind of collective."""
    sums: Counter[str] = Counter()
    for collective in collectives:
        if collective.bytes > SMALL and not collective.on_host:
            sums[collective.name] += collective.bytes
    return dict(sums)


def _line() -> str:
    """The innermost line of wikift, and of DeepSpeed where that asked."""
    own = inner = ""
    frame = sys._getframe(1)
    while frame is not None and not own:
        path = frame.f_code.co_filename
        if "/deepspeed/" in path and not inner:
            inner = f" < deepspeed/{path.split('/deepspeed/')[-1]}:{frame.f_lineno}"
        if "/wikift/" in path and "/tests/" not in path:
            own = f"wikift/{path.split('/wikift/')[-1]}:{frame.f_lineno}"
        frame = frame.f_back
    return (own or "the backward pass") + inner


def built_guard() -> Path:
    """guard.cpp, compiled once for this torch. Raises OSError where there is no g++."""
    lib = Path(tempfile.gettempdir()) / f"wikift-tests-{os.getuid()}" / f"guard-{torch.__version__}.so"
    if not lib.exists() or lib.stat().st_mtime < _SOURCE.stat().st_mtime:
        lib.parent.mkdir(exist_ok=True)
        root, new = Path(torch.__file__).parent, lib.with_suffix(f".{os.getpid()}")
        subprocess.run(
            [
                "g++",
                "-O0",
                "-std=c++20",
                "-fPIC",
                "-shared",
                f"-I{root}/include",
                str(_SOURCE),
                "-o",
                str(new),
                f"-L{root}/lib",
                "-lc10",
                "-ltorch_cpu",
            ],
            check=True,
        )
        new.replace(lib)
    return lib


@contextlib.contextmanager
def pretended(rank: int = 0, ranks: int = 1) -> Iterator[Seen]:
    """Inside, this process is `rank` of `ranks` on hosts of eight H100s each, several started by a launcher."""
    seen = Seen()
    ctypes.CDLL(str(built_guard()))
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(min(8, ranks))}
        os.environ |= {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    _pretend_cuda(seen)
    _pretend_ranks(rank, ranks)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is then made on the CPU and copied
    with _Routes(seen):
        yield seen


def _pretend_cuda(seen: Seen) -> None:
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
    properties.warp_size, properties.max_threads_per_multi_processor, properties.regs_per_multiprocessor = (
        32,
        2048,
        2**16,
    )
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


def _pretend_ranks(rank: int, ranks: int) -> None:
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


class _Routes(TorchDispatchMode):
    """Operations with a tensor or a device of CUDA go to torch's FakeTensorMode, others are done."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen, self.fake = seen, FakeTensorMode(allow_non_fake_inputs=True)
        self._held: set[int] = set()
        self._numbers = WeakIdKeyDictionary()  # of small tensors that came from the host

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if any(type(t) not in (FakeTensor, Tensor, torch.nn.Parameter) for t in tensors):
            return NotImplemented  # a DTensor first takes itself apart
        fakes = [t for t in tensors if isinstance(t, FakeTensor)]
        if op.namespace == "c10d":
            return self._collective(op, args, kwargs, on_host=not fakes)
        if not fakes and not any(isinstance(leaf, torch.device) and leaf.type == "cuda" for leaf in leaves):
            return op(*args, **kwargs)
        name = op._schema.name.split("::")[1]
        if name in _WAITS:
            self.seen.wait(name)
        if name == "_local_scalar_dense":
            return self._on_host(fakes[0], fakes[0].dtype).item()
        if name == "equal":
            return True
        from_host = None
        if name in ("copy_", "_to_copy"):
            source = args[name == "copy_"]
            target = args[0] if name == "copy_" else None
            place = target.device if target is not None else kwargs.get("device") or source.device
            at_once = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            if place.type == "cpu":
                if at_once:
                    self.seen.wait("copy to the host")
                if target is not None:
                    return target.copy_(self._on_host(source, target.dtype))
                return self._on_host(source, kwargs.get("dtype") or source.dtype)
            if source.device.type == "cpu":
                from_host = source.detach().clone() if source.numel() <= 1024 else None
                if (target is None or source.dim()) and (at_once or not source.is_pinned()):
                    self.seen.wait("copy from the host")
        if op._schema.is_mutable and fakes:
            self._numbers.pop(fakes[0], None)
        with self.fake:
            args, kwargs = tree_map(_bare, (args, kwargs))
            result = op(*args, **kwargs)
        if from_host is not None:
            self._numbers[result] = from_host
        part = self.seen.part
        if not op.is_view and name not in _NO_KERNEL and op.namespace != "prim":
            part.launches += 1
        if name == "embedding_dense_backward":  # the last gradient of all: the model begins with it
            part.collectives = [collective._replace(early=True) for collective in part.collectives]
        for tensor in tree_leaves(result):
            if isinstance(tensor, FakeTensor) and tensor.device.type == "cuda":
                self._hold(tensor.untyped_storage())
        return result

    def _on_host(self, fake: Tensor, dtype: torch.dtype) -> Tensor:
        """What the host gets of `fake`: what it sent, where that is known, else zeros."""
        numbers = self._numbers.get(fake)
        return torch.zeros(fake.shape, dtype=dtype) if numbers is None else numbers.to(dtype).view(fake.shape)

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._held:
            self._held.add(key)
            self.seen.now += size
            self.seen.part.most = max(self.seen.part.most, self.seen.now)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._held.discard(key)
        self.seen.now -= size

    def _collective(self, op: Any, args: Any, kwargs: Any, on_host: bool) -> Any:
        largest = max(([t for t in tree_leaves(arg) if isinstance(t, Tensor)] for arg in args), key=_bytes)
        name = op._schema.name.removeprefix("c10d::").strip("_")
        name = next((known for part, known in _COLLECTIVES if part in name), name)
        if largest:
            self.seen.part.collectives.append(Collective(name, _bytes(largest), largest[0].dtype, on_host))
        if on_host:
            return op(*args, **kwargs)
        done = torch.futures.Future()  # type: ignore[var-annotated]
        done.set_result([t for t in tree_leaves(args[0]) if isinstance(t, Tensor)])
        work = torch._C._distributed_c10d._create_work_from_future(done).boxed()
        return work if len(op._schema.returns) == 1 else (args[0], work)


def _bare(value: Any) -> Any:
    """A CPU tensor without its numbers, for a FakeTensorMode takes those of one element as they are."""
    if isinstance(value, Tensor) and not isinstance(value, FakeTensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    return value


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
