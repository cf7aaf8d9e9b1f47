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
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from tests.cuda.seen import Seen, collective_of
from tests.cuda.stand_ins import built_guard, pretend_cuda, pretend_ranks

# operations that start no kernel, or have no counterpart on a GPU
_NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_"}
_NO_KERNEL |= {"_unsafe_view", "view", "_reshape_alias", "alias", "detach", "lift_fresh"}
_WAITS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "unique", "_unique2"}


@contextlib.contextmanager
def pretended(rank: int = 0, ranks: int = 1) -> Iterator[Seen]:
    """Inside, this process is `rank` of `ranks` on hosts of eight H100s each, several started by a launcher."""
    seen = Seen()
    ctypes.CDLL(str(built_guard()))
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(min(8, ranks))}
        os.environ |= {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    pretend_cuda(seen)
    pretend_ranks(rank, ranks)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is then made on the CPU and copied
    with _Routes(seen):
        yield seen


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
                from_host = source.detach().clone() if source.numel() <= 8192 else None
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
        if numbers is None:  # not torch.zeros, which ZeRO-3 replaces by one on the device
            return torch.ops.aten.zeros(fake.shape, dtype=dtype, device="cpu")
        return numbers.to(dtype).view(fake.shape)

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
        self.seen.part.collectives += collective_of(op, args, on_host)
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


if __name__ == "__main__":  # python -m tests.cuda.pretended MODULE ARGUMENTS: as python -m MODULE ARGUMENTS
    import runpy

    del sys.argv[0]
    with pretended():
        torch.cuda.device_count = lambda: 1
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
