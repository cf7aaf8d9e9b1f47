"""A device that is not there: tensors with a shape, a type and a place, and no numbers (torch's FakeTensorMode).

What a GPU would be asked to do runs on any machine as far as that goes: a tensor that was left on the CPU, or a step
that waits for a number (`.item()`, `if tensor:`), raises. Autocast has the rules of CUDA's for a GPT-2's operations.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils, modeling_utils

NAME = "elsewhere"
_LOWER = ("linear", "addmm", "mm", "bmm", "matmul", "baddbmm", "scaled_dot_product_attention")  # in autocast's type
_WIDER = ("layer_norm", "softmax.int", "log_softmax.int", "sum", "sum.dim_IntList", "nll_loss", "cross_entropy_loss")


@functools.cache
def device() -> torch.device:
    """The device, made known to torch once a process."""

    class Module(backend_registration._DummyBackendModule):
        def is_available(self) -> bool:
            return False

        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16, torch.float16]

    class Hook(backend_registration._DummyPrivateUse1Hook):
        def is_available(self) -> bool:
            return False

    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Module(), hook=Hook())
    every, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in _LOWER:
        aten.impl(name, _cast(name, lambda: torch.get_autocast_dtype(NAME)), "AutocastPrivateUse1")
    for name in _WIDER:
        aten.impl(name, _cast(name, lambda: torch.float32), "AutocastPrivateUse1")
    aten.impl("scaled_dot_product_attention", _flash_attention, "AutogradPrivateUse1")
    device.kept = every, aten  # type: ignore[attr-defined]  # what is registered goes with them
    return torch.device(NAME, 0)


def _flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What CUDA takes where there is no mask; it keeps no squares."""
    if attn_mask is not None:
        found, _ = torch.ops.aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale
        )
    else:
        found = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )[0]
    return found  # type: ignore[no-any-return]


def _cast(name: str, dtype: Callable[[], torch.dtype]) -> Callable[..., Any]:
    operation, _, overload = name.partition(".")
    call = getattr(getattr(torch.ops.aten, operation), overload or "default")
    autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def cast(value: Any) -> Any:
        narrow = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype()) if narrow else value

    def kernel(*given: Any, **words: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(autocast):
            return call(*map(cast, given), **{key: cast(value) for key, value in words.items()})

    return kernel


@contextlib.contextmanager
def without_numbers() -> Iterator[torch.device]:
    """Inside, every tensor that is made is a fake one."""
    place = device()
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True):
        for module in (masking_utils, modeling_utils):  # in a trace transformers does not look at numbers
            patch.setattr(module, "is_tracing", lambda *given: False)
        yield place


class Held(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside and live: `now`, and at `most`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, given: Any = (), words: Any = None) -> Any:
        found = operation(*given, **(words or {}))
        for tensor in torch.utils._pytree.tree_leaves(found):
            if isinstance(tensor, Tensor) and tensor.device.type == NAME:
                self._count(tensor.untyped_storage())
        return found

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
