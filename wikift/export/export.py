"""A checkpoint to a standard Hugging Face directory, tensor by tensor: memory is one tensor, whatever the model.

Cost: the checkpoint is read once to verify its checksums, by threads beside the writing, its weights once more to be
written. Published by one rename (folder.py): a reader sees the earlier export or the new one, never a part.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from wikift import __version__
from wikift.base import folders
from wikift.base.errors import UserError
from wikift.base.files import show_bytes
from wikift.checkpoint.reader import open_checkpoint
from wikift.export.card import model_card
from wikift.export.folder import FORMAT, check_target, published
from wikift.export.weights import write_weights


def export(path: Path, target: Path, *, dtype: str, shard_bytes: int, say: Callable[[str], None]) -> None:
    """Make the folder `target` of the checkpoint `path`, weights as `dtype` in files of at most `shard_bytes`.

    Raises UserError where the checkpoint is damaged or `target` is not this run's, EnvironmentFault where the disk is
    full or cannot be written; in both cases an earlier export at `target` still stands.
    """
    run = path.parent.parent
    config = folders.run_config(run)
    record: dict[str, Any] = {"format": FORMAT, "run": _identity(run, config), "wikift": __version__}
    check_target(target, record["run"], own=target.absolute() == (run / "hf").absolute())
    with _naming_other_checkpoints(path):
        checkpoint = open_checkpoint(path)
    record |= {"step": checkpoint.step, "tokens": checkpoint.manifest.get("tokens"), "dtype": dtype}
    with published(target) as partial, ThreadPoolExecutor(os.cpu_count()) as pool:
        checks = [pool.submit(checkpoint.verify, name) for name in checkpoint.manifest["files"]]
        _write_model_files(run, partial, dtype)
        size = write_weights(checkpoint, partial, dtype, shard_bytes)
        for check in checks:  # what was written is published only if what was read is as it was saved
            with _naming_other_checkpoints(path):
                check.result()
        card = model_card(run, config, checkpoint.manifest, dtype)
        (partial / "README.md").write_text(card, encoding="utf-8")
        _write_json(partial / folders.EXPORT_RECORD, record)
    say(f"{target}: step {checkpoint.step:,} as {dtype}, {show_bytes(size)} of weights")


@contextlib.contextmanager
def _naming_other_checkpoints(path: Path) -> Iterator[None]:
    """The error of a damaged checkpoint names another one of its run."""
    try:
        yield
    except UserError as error:
        run = path.parent.parent
        others = [step for step in folders.checkpoint_steps(run) if folders.step_folder(run, step).name != path.name]
        fix = f"; another: --step {others[-1]}" if others else "; the run has no other checkpoint"
        raise UserError(*(problem + fix for problem in error.problems)) from None


def _identity(run: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What tells this run's exports from another's: its name, seed, model and text."""
    settings, splits = config["settings"], config.get("store", {}).get("splits", {})
    return {
        "name": run.absolute().name,
        "seed": settings["seed"],
        "model": None if settings["from_scratch"] else settings["model"],
        "data": {name: split.get("sha256") for name, split in splits.items()},
    }


def _write_model_files(run: Path, folder: Path, dtype: str) -> None:
    """The run's model configuration with `dtype` set, and its generation configuration and tokenizer as they are."""
    source = run / "model"
    try:
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: the model's config.json cannot be read ({error}); the run is damaged") from None
    config["dtype"] = dtype
    config.pop("torch_dtype", None)  # transformers 4's name for it
    _write_json(folder / "config.json", dict(sorted(config.items())))
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name not in ("config.json", "README.md") and path.suffix != ".safetensors":
            shutil.copyfile(path, folder / path.name)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
