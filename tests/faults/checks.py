"""What is on the disk, in memory and among the processes after a command."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any


def artifacts(root: Path) -> dict[str, str]:
    """A hash of everything published in `root`, by name; what is being moved aside counts as if it were not."""
    found: dict[str, Path] = {}
    for run in (root / "run" / ".before.partial", root / "run"):
        paths = [run / name for name in (".model.old", "model", ".hf.old", "hf", "config.json", "../out")]
        paths += [*run.glob("checkpoints/step-*"), *run.glob("before-*")]
        found |= {path.name.removeprefix(".").removesuffix(".old"): path for path in paths if path.exists()}
    return {name: _hash(path) for name, path in found.items()}


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        content = file.read_bytes() if file.is_file() else b""
        if file.name == "manifest.json":
            # settings: a step that was there may come from a command for fewer steps
            rest = {
                k: v for k, v in json.loads(content).items() if "seconds" not in k and k not in ("sha256", "settings")
            }
            content = json.dumps(rest).encode()
        if file.name == "metrics.jsonl":
            content = json.dumps(losses(file)).encode()
        digest.update(f"{file.relative_to(path)} {len(content)}".encode() + content)
    return digest.hexdigest()


def losses(file: Path) -> list[Any]:
    """What must be the same in two runs, by step; of a torn last line nothing."""
    rows = []
    for line in file.read_text().splitlines(keepends=True) if file.exists() else []:
        if line.endswith("\n"):
            values = json.loads(line)
            rows.append([values.get(name) for name in ("step", "loss", "grad_norm", "tokens", "eval_loss")])
    return rows


def shared() -> set[str]:
    """Shared memory; semaphores, which other programs on this machine make and remove at any time, aside."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.")}


def names(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def orphans(seconds: float = 3.0) -> bool:
    """Whether something that a command started still runs after some seconds; it is killed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if not os.waitpid(-1, os.WNOHANG)[0]:
                time.sleep(0.01)
        except ChildProcessError:
            return False
    for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        os.kill(int(pid), signal.SIGKILL)
    return True
