"""Golden runs: 12 steps of every engine, equal to the last bit before and after a change of the code.

    python -m tests.golden record     before the change: writes golden.json
    python -m tests.golden            after it: exit code 1 where a bit differs

Each run trains 12 steps in fp32 with dropout on, from a checkpoint after the 6th a second time, and is recorded as its
losses, gradient norms and validation losses and a hash of all weights and moments. The file belongs to one machine:
processors round differently.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors import safe_open

from tests.matrix import Place, line, train_all
from tests.ranks import run_ranks
from tests.tiny import curve, tiny_store

FILE = Path(__file__).resolve().parent.parent / "golden.json"
PLACES = (Place("single", 1), *(Place(engine, 2) for engine in ("ddp", "fsdp", "zero1", "zero2", "zero3")))
STEPS, SAVED = 12, 6


def golden_run(place: Place, store: Path, folder: Path) -> dict[str, Any]:
    """The curve and the hashes of a whole run at `place`, and of one resumed in the middle."""
    whole, resumed = folder / f"{place}", folder / f"{place} resumed"
    settings: dict[str, Any] = {
        "dropout": 0.1, "max_steps": STEPS, "save_steps": SAVED, "eval_steps": 3, "warmup_steps": 3,
        "lr_scheduler_type": "cosine",
    }  # fmt: skip
    run_ranks(train_all, place.ranks, [line(place, store, whole, **settings)], timeout_seconds=300)
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / f"step-{STEPS:08d}")
    run_ranks(train_all, place.ranks, [line(place, store, resumed, **settings)], timeout_seconds=300)
    return {"whole": _facts(whole), "resumed": _facts(resumed)}


def _facts(run: Path) -> dict[str, Any]:
    values: dict[tuple[str, str, int], bytes] = {}
    for file in (run / "checkpoints" / f"step-{STEPS:08d}").glob("*.safetensors"):
        with safe_open(file, "np") as tensors:  # type: ignore[no-untyped-call]
            for key in tensors.keys():  # noqa: SIM118
                name, state, start = key.split("|")
                values[name, state, int(start)] = tensors.get_tensor(key).tobytes()
    digests = {}
    for state in sorted({state for _, state, _ in values}):
        digest = hashlib.sha256()
        for key in sorted(key for key in values if key[1] == state):
            digest.update(values[key])
        digests[state] = digest.hexdigest()
    return {"curve": [list(map(repr, step)) for step in curve(run)], "sha256": digests}


def main(words: list[str]) -> int:
    """Record or compare; returns the exit code."""
    with tempfile.TemporaryDirectory() as name:
        store = tiny_store(Path(name) / "store")
        found = {str(place): golden_run(place, store, Path(name)) for place in PLACES}
    unequal = [f"{name}: the resumed run differs from the whole one" for name, runs in found.items()
               if runs["whole"] != runs["resumed"]]  # fmt: skip
    if words == ["record"]:
        FILE.write_text(json.dumps(found, indent=1))
    else:
        golden = json.loads(FILE.read_text())
        unequal += [f"{name}: differs from {FILE.name}" for name in golden if found.get(name) != golden[name]]
    print(*unequal or [f"{len(found)} golden runs {'recorded' if words else 'are equal to the last bit'}"], sep="\n")
    return 1 if unequal else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
