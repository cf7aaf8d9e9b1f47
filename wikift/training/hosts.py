"""The hosts of a run: what must be the same on all, as it would show late or never, and what they compute with."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers

from wikift.base.errors import UserError
from wikift.base.files import faults_of_writing
from wikift.base.world import World, seed
from wikift.data.store import TokenStore, open_store


def check_hosts(run: Path, store: TokenStore, world: World) -> Path:
    """Whether every host sees rank 0's `run` folder, and its text, and the tokens are as they were written; collective.

    Returns `run`. Raises UserError where one does not. The stores may be copies, made on each host or not; each is read
    once.
    """
    if world.local_rank == 0:  # 0.6 s per GB (SHA-256)
        open_store(store.path, verify=True)
    if world.local_size == world.size:
        return run
    meeting = run / f".meeting-{world.shared(os.urandom(6).hex())}"  # a name that no file system can have in a cache
    if world.rank == 0:
        with faults_of_writing(run):
            meeting.mkdir()
    try:
        world.barrier()
        other_folder = _ranks(world, not meeting.is_dir())
    finally:
        if world.rank == 0:
            meeting.rmdir()
    text = seed(0, store.fingerprint)
    other_text = _ranks(world, text != world.shared(text))
    problems = []
    if other_folder:
        problems.append(
            f"--output-dir {run}: is a different folder on rank {other_folder} than on rank 0; name one on "
            "a disk that all hosts share (docs/how-to/several-machines.md)"
        )
    if other_text:
        problems.append(
            f"--data {store.path}: has different tokens on rank {other_text} than on rank 0; copy rank 0's "
            "there, or prepare it from the same text with the same tokenizer"
        )
    if problems:
        raise UserError(*problems)
    return run


def environment(device: torch.device, precision: str, compiled: str) -> dict[str, Any]:
    """What computes, for the run's record: versions, of wikift's own checkout the commit, the device."""
    versions = {module.__name__: module.__version__ for module in (torch, transformers)}
    gpu = device.type == "cuda"
    facts = {"python": platform.python_version(), **versions, "system": platform.platform()}
    facts |= {"precision": precision, "compile": compiled}
    facts["device"] = torch.cuda.get_device_name(device) if gpu else f"CPU, {os.cpu_count()} cores"
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / ".git").exists():
        git = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        facts["wikift_commit"] = git.stdout.strip()
    return facts


def _ranks(world: World, wrong: bool) -> str:
    """The ranks on which something is `wrong`, listed; collective."""
    flags = torch.zeros(world.size)
    flags[world.rank] = float(wrong)
    return ", ".join(str(rank) for rank, value in enumerate(world.total(flags).tolist()) if value)
