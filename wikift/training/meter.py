"""Tokens per second, MFU, memory and time left, with validation and saving taken out of the clock."""

from __future__ import annotations

import contextlib
import re
import resource
import time
from collections import deque
from collections.abc import Callable, Iterator
from statistics import fmean, median
from typing import Any

import torch

from wikift.base.files import show_bytes
from wikift.base.shape import Shape
from wikift.watch.profile import DATA

# Dense bf16/fp16 FLOP/s, from NVIDIA's data sheets, SXM parts where there are several; first match.
_PEAK_FLOPS = (
    ("H200 NVL", 835e12), ("H200", 989.4e12), ("H100 PCIe", 756e12), ("H100 NVL", 835e12), ("H100", 989.4e12),
    ("GH200", 989.4e12), ("B200", 2250e12), ("A100", 312e12), ("L40S", 362e12), ("L40", 181e12), ("L4", 121e12),
    ("A10G", 70e12), ("RTX 4090", 165.2e12), ("V100-PCIE", 112e12), ("V100", 125e12), ("T4", 65e12),
)  # fmt: skip

# on a GPU in a step: gpt2's backward pass takes 23 ms then on an H100 (at 40% of its peak), and just hides the exchange
# of its gradients at 40 GB/s, 22 ms
_FEW_TOKENS = 16_384


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The device's peak FLOP/s in half precision; None where it is not known, as of a CPU."""
    return None if device.type != "cuda" or precision == "fp32" else peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """A GPU's peak FLOP/s in half precision by its name; None where it is not known."""
    return next((peak for part, peak in _PEAK_FLOPS if re.search(rf"\b{part}\b", name)), None)


def few_tokens(tokens: int, shape: Shape, block_size: int, reduced: int) -> Iterator[str]:
    """A warning where `tokens` of a step on each GPU are too few to hide its gradients, `reduced` bytes a parameter."""
    if tokens < _FEW_TOKENS:
        work = tokens * shape.flops_per_token(block_size) / 1e12
        yield (
            f"warning: {tokens:,} tokens per GPU and step, below {_FEW_TOKENS:,}, scale badly: they are {work:.1f} "
            f"TFLOP for {show_bytes(reduced * shape.parameters)} of gradients to exchange; use fewer GPUs, or a larger "
            "--global-batch-size, which is another experiment"
        )


_BY_RANK = ("memory_gb", "data_wait", "matmul_ms", "busy")
_MATMUL_SECONDS = 10.0  # from one measurement of a rank's speed to the next


class Meter:
    """Measures the steps between two readings. `clock` gives seconds, `eval_tokens` is a validation's length."""

    def __init__(
        self,
        device: torch.device,
        flops_per_token: float,
        peak: float | None,
        clock: Callable[[], float] = time.perf_counter,
        eval_tokens: int = 0,
        ranks: int = 1,
    ) -> None:
        self.device, self.flops_per_token, self.peak, self.clock = device, flops_per_token, peak, clock
        self.eval_tokens, self.ranks = eval_tokens, ranks
        self.matmuls = deque[float](maxlen=5)  # milliseconds of the last ones
        self.next_matmul = 0.0
        self.pauses: list[float] = []  # seconds of each validation so far, its samples and its save included
        self.pause = 0.0  # what the last reading expected of one
        self.tokens = self.steps = 0
        self.away = 0.0  # seconds spent on other things since the last reading
        self.waited = 0.0  # seconds spent waiting for batches
        self.since = clock()

    def own(self, loss: float, busy: float) -> list[float]:
        """This rank's numbers, for the others: `loss` and what `_BY_RANK` names."""
        if self.ranks > 1 and self.clock() >= self.next_matmul:
            self.matmuls.append(matmul_ms(self.device))
            self.next_matmul = self.clock() + _MATMUL_SECONDS
        matmul = median(self.matmuls) if len(self.matmuls) == self.matmuls.maxlen else 0.0  # one alone is chance
        return [loss, memory_gb(self.device), self.waited / self._seconds(), matmul, busy]

    def _seconds(self) -> float:
        return max(1e-9, self.clock() - self.since - self.away)

    def step(self, tokens: int) -> None:
        """One optimizer step over `tokens` tokens, all ranks together."""
        self.tokens += tokens
        self.steps += 1

    @contextlib.contextmanager
    def paused(self, due: bool) -> Iterator[None]:
        """What happens inside is not training; `due`: a validation, of which more will come."""
        start = self.clock()
        yield
        self.away += self.clock() - max(start, self.since)  # since `restart`, where that was inside
        if due:
            self.pauses.append(self.clock() - start)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """What happens inside is waiting for data."""
        start = self.clock()
        with torch.profiler.record_function(DATA):
            yield
        self.waited += self.clock() - start

    def reading(self, steps_left: int, pauses_left: int, rows: list[list[float]]) -> dict[str, Any]:
        """tokens_per_second, mfu (where the peak is known), seconds_left, and of `rows`, each rank's `own`, the rest.

        memory_gb and data_wait, the share of the time that a process waited for batches, are the first rank's.
        """
        seconds, ranks = self._seconds(), len(rows)
        tokens_per_second = self.tokens / seconds
        # before the first validation: a forward is a third of a step's work
        self.pause = fmean(self.pauses or [self.eval_tokens / (3 * max(1.0, tokens_per_second))])
        each = {name: [row[index] for row in rows] for index, name in enumerate(_BY_RANK, 1)}
        reading: dict[str, Any] = {
            "loss": fmean(row[0] for row in rows),
            "tokens_per_second": tokens_per_second,
            **{name: each[name][0] for name in ("memory_gb", "data_wait")},
            **({"ranks": each} if ranks > 1 else {}),
            "seconds_left": seconds / max(1, self.steps) * steps_left + self.pause * pauses_left,
        }
        if self.peak is not None:
            reading["mfu"] = tokens_per_second * self.flops_per_token / (self.peak * ranks)
        return reading

    def restart(self) -> None:
        self.since, self.away, self.waited, self.tokens, self.steps = self.clock(), 0.0, 0.0, 0, 0


def matmul_ms(device: torch.device) -> float:
    """Milliseconds of the same piece of work on every rank, some five on a core: in a step all wait for the slowest."""
    on_gpu = device.type == "cuda"
    square = torch.ones(
        (4096, 4096) if on_gpu else (512, 512), dtype=torch.half if on_gpu else torch.float, device=device
    )
    for _ in range(2):  # the first one loads what it needs
        if on_gpu:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        square @ square
        if on_gpu:
            torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - start)


def memory_gb(device: torch.device) -> float:
    """The most this process has held so far: on the GPU, or resident on the host (10^9 bytes)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
