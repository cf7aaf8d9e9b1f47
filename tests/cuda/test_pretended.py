"""The pretended GPU sees what it is for: pytest tests/cuda/test_pretended.py"""

from __future__ import annotations

import torch

from tests.cuda.pretended import pretended
from tests.cuda.stand_ins import DEVICE
from tests.ranks import run_ranks


def faults() -> tuple[list[str], str, int, list[str]]:
    with pretended(ranks=2) as seen:
        torch.distributed.init_process_group("nccl")
        host, device = torch.ones(4), torch.ones(4, device=DEVICE)
        (device * 2).sum().item()
        device.cpu()
        host.to(DEVICE, non_blocking=True)
        host.pin_memory().to(DEVICE)
        waits = [what for what, _ in seen.part.waits.elements()]
        seen.begin("right")
        host.pin_memory()[1:].to(DEVICE, non_blocking=True)
        torch.empty(4, pin_memory=True).copy_(device, non_blocking=True)
        right = seen.part.waits.total()
        try:
            error = str(device + host)
        except RuntimeError as wrong:
            error = str(wrong)
        seen.begin("collectives")
        for tensor in (device, host):
            torch.distributed.all_reduce(tensor)
        return waits, error, right, [f"{c.name} {c.bytes} {c.on_host}" for c in seen.part.collectives]


def test_waits_devices_and_collectives_are_seen() -> None:
    ((waits, error, right, collectives),) = run_ranks(faults, 1)
    assert waits == ["_local_scalar_dense", "copy to the host", "copy from the host", "copy from the host"]
    assert right == 0
    assert "cuda:0 and cpu" in error
    assert collectives == ["all_reduce 16 False", "all_reduce 16 True"]
