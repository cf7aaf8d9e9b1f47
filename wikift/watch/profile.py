"""Where the time goes: torch's profiler over a few steps, as a trace for Perfetto and a table of one screen."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from wikift.base.files import faults_of_writing

DATA = "wikift: waiting for data"
WARM_UP = 2  # steps, before what is profiled: memory and kernels are chosen in them
_TOP = 8  # of single operations
_KINDS = (  # the first whose pattern is in an operation's name
    ("data", re.escape(DATA)),
    ("communication", "nccl|gloo|c10d|all_?reduce|all_?gather|reduce_?scatter|broadcast"),
    ("optimizer", "adam|multi_tensor|foreach"),
    ("attention", "attention|flash|fmha|sdpa|bmm|(?<!log)_softmax"),
    ("matmul", r"mm\b|matmul|linear|gemm|gemv|cutlass|cublas|xmma|sparse_dense"),
    ("element-wise", "aten::|at::|triton|Kernel|Backward|Memcpy|Memset"),
)


class Profiler:
    """Profiles `steps` steps of this process, after two that warm up; none where `steps` is 0."""

    def __init__(self, run: Path, steps: int, on_gpu: bool, say: Callable[[str], None]) -> None:
        self.path, self.steps, self.on_gpu, self.say = run / "profile" / "trace.json.gz", steps, on_gpu, say
        self.done, self.started = 0, 0.0
        self.profile: profile | None = None

    def step(self) -> None:
        """A step is done."""
        self.done += 1
        if self.steps and self.done == WARM_UP:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_gpu else [])]
            self.profile = profile(activities=activities)
            self.profile.start()
            self.started = time.perf_counter()
        elif self.done == WARM_UP + self.steps:
            self.finish()

    def finish(self) -> None:
        """Write the trace and tell the table, where a profile is being made."""
        if self.profile is None:
            return
        made, self.profile, steps = self.profile, None, self.done - WARM_UP
        made.stop()
        seconds = time.perf_counter() - self.started
        with faults_of_writing(self.path.parent):
            self.path.parent.mkdir(exist_ok=True)
            self.path.unlink(missing_ok=True)  # not to be written through, where it is a link
            made.export_chrome_trace(str(self.path))
        self.say(table(made.key_averages(), seconds, self.on_gpu, max(1, steps)))
        self.say(f"the trace is {self.path}, for https://ui.perfetto.dev")


def table(operations: Iterable[Any], seconds: float, on_gpu: bool, steps: int) -> str:
    """Time by kind and of the longest operations; `host` is what none of them took: Python, or a GPU without work."""
    kinds = dict.fromkeys([*(name for name, _ in _KINDS), "host"], 0.0)
    longest: list[tuple[float, str]] = []
    waited = 0.0
    for operation in operations:
        kind = next((name for name, pattern in _KINDS if re.search(pattern, operation.key, re.IGNORECASE)), "host")
        of_gpu = operation.device_type == DeviceType.CUDA
        taken = (operation.self_device_time_total if of_gpu else operation.self_cpu_time_total) / 1e6
        if kind == "data":
            waited += taken if not of_gpu else 0.0
        elif of_gpu == on_gpu and kind != "host":
            kinds[kind] += taken
            longest.append((taken, operation.key))
    left = max(0.0, seconds - sum(kinds.values()))
    kinds["data"] = min(waited, left)
    kinds["host"] = left - kinds["data"]
    rows = sorted(kinds.items(), key=lambda item: -item[1])
    lines = [f"{steps} steps of {1000 * seconds / steps:.1f} ms, {'of the GPU' if on_gpu else 'of the first process'}:"]
    lines += [f"  {name:<14}{taken / seconds:6.1%}{1000 * taken / steps:10.1f} ms a step" for name, taken in rows]
    lines += ["the longest operations:"]
    lines += [f"  {taken / seconds:6.1%}  {name[:60]}" for taken, name in sorted(longest, reverse=True)[:_TOP]]
    return "\n".join(lines)
