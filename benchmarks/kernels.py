"""Single kernels of a step in gpt2's shape, forward and backward: `python -m benchmarks.kernels head|attention`.

`head`: wikift's head and loss, whole logits, and torch's `linear_cross_entropy` where this torch has one, in bf16 and,
on a CPU, in fp32: milliseconds, memory, and how far the weight's gradient is from that of whole logits in fp32.
`attention`: milliseconds of each kernel of torch's that can. A line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import interleave
from benchmarks.train import finished
from wikift.engines.build import missing_for_compiling
from wikift.kernels.loss import compiled_passes, plain_losses, summed_loss

WIDTH, HEADS, VOCABULARY, POSITIONS = 768, 12, 50257, 1024
KERNELS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")


def heads(hidden: Tensor, weight: Tensor, targets: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The mean loss in each way."""
    device, count = hidden.device.type, len(targets)
    ways = {"wikift": lambda: summed_loss(hidden, weight, targets) / count}
    if device == "cuda" and not missing_for_compiling(device):
        ways["wikift, compiled"] = lambda: summed_loss(hidden, weight, targets, compiled_passes()) / count
    ways["whole logits"] = lambda: plain_losses(hidden, weight, targets).mean()
    if hasattr(F, "linear_cross_entropy"):
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        of = partial(F.linear_cross_entropy, hidden.to(low), weight.to(low), targets)
        ways["torch, in one piece"] = of
        if options := getattr(torch.nn, "LinearCrossEntropyOptions", None):  # torch 2.13
            ways["torch, its chunks"] = lambda: of(options=options())
            ways["torch, chunks of 8,192"] = lambda: of(options=options(batch_chunk_size=8192, chunking_method=None))
    return ways


def head(device: str, blocks: int, rounds: int) -> dict[str, Any]:
    """Milliseconds, memory and the gradient of each way."""
    torch.manual_seed(0)
    positions = blocks * POSITIONS
    hidden = torch.randn(positions, WIDTH, device=device, requires_grad=True)
    weight = (torch.randn(VOCABULARY, WIDTH, device=device) * 0.02).requires_grad_()
    targets = torch.randint(VOCABULARY, (positions,), device=device)

    def work(way: str, dtype: torch.dtype) -> Tensor:
        weight.grad = hidden.grad = None
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            heads(hidden, weight, targets)[way]().backward()
        assert weight.grad is not None
        return weight.grad

    exact, kinds = work("whole logits", torch.float32), [torch.bfloat16, *[torch.float32] * (device == "cpu")]
    ways = heads(hidden, weight, targets)
    cases = {f"{way}, {str(kind)[6:]}": partial(work, way, kind) for way in ways for kind in kinds}
    off = {name: float((case() - exact).norm() / exact.norm()) for name, case in cases.items()}
    figures = interleave({name: partial(timed, case, device) for name, case in cases.items()}, rounds, uncounted=1)
    return {
        name: {"gradient off": off[name], **{key: statistics.median(values) for key, values in found.items()}}
        for name, found in figures.items()
    }


def timed(work: Callable[[], Any], device: str) -> dict[str, float]:
    """Milliseconds of one, and on a GPU the most memory."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    finished(device)
    begun = time.perf_counter()
    work()
    finished(device)
    found = {"ms": 1000 * (time.perf_counter() - begun)}
    return found | ({"peak GB": torch.cuda.max_memory_allocated() / 1e9} if device == "cuda" else {})


def attention(device: str, blocks: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of each kernel at dropout 0 and 0.1, and where torch chooses."""
    parts = [torch.randn(blocks, HEADS, POSITIONS, WIDTH // HEADS, device=device, dtype=torch.bfloat16) for _ in "qkv"]
    found: dict[str, Any] = {}
    for name in ("chosen by torch", *KERNELS):
        kernels = [getattr(SDPBackend, kernel) for kernel in KERNELS if name in (kernel, "chosen by torch")]
        for dropout in (0.0, 0.1):
            work = partial(attend, parts, dropout, kernels)
            try:
                times = [timed(work, device)["ms"] for _ in range(rounds + 1)]
                found[f"{name}, dropout {dropout:g}"] = statistics.median(times[1:])
            except RuntimeError as error:  # not every kernel can do it
                found[f"{name}, dropout {dropout:g}"] = str(error)[:200]
    return found


def attend(parts: list[Tensor], dropout: float, kernels: list[SDPBackend]) -> None:
    query, key, value = (part.detach().requires_grad_() for part in parts)
    with sdpa_kernel(kernels):
        F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True).sum().backward()


def main() -> None:
    """Measure, and say it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("head", "attention"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--blocks", type=int, help="of 1,024 positions; default 32, 2 on a CPU")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    blocks = asked.blocks or (32 if asked.device == "cuda" else 2)
    measure = head if asked.what == "head" else attention
    print(json.dumps(measure(asked.device, blocks, asked.rounds)))


if __name__ == "__main__":
    main()
