"""A checkpoint to a standard Hugging Face directory, tensor by tensor: memory is one tensor, whatever the model.

Cost: the checkpoint is read once to verify its checksums, by threads beside the writing, its weights once more to be
written. Published by one rename: a reader sees the earlier export or the new one, never a part.
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
from wikift.base.errors import EnvironmentFault, UserError, one_line
from wikift.base.files import parse_object, read_json, sha256_of, show_bytes
from wikift.base.hub import CONFIG, TOKENIZER
from wikift.base.model_files import changed_file
from wikift.base.names import EXPORT_RECORD
from wikift.base.publish import folder_lock, publish_folder
from wikift.base.signals import stopping_by_exception
from wikift.checkpoint.reader import open_checkpoint
from wikift.export.card import model_card
from wikift.export.weights import write_weights

FORMAT = "wikift-export-1"


def export(path: Path, target: Path, *, dtype: str, shard_bytes: int, say: Callable[[str], None]) -> None:
    """Make the folder `target` of the checkpoint `path`, weights as `dtype` in files of at most `shard_bytes`.

    Raises UserError where the checkpoint is damaged or `target` is not this run's, EnvironmentFault where the disk is
    full or cannot be written; in both cases an earlier export at `target` still stands.
    """
    run = path.parent.parent
    config = folders.run_config(run)
    with _reading_config(run):
        record: dict[str, Any] = {"format": FORMAT, "run": _identity(run, config), "wikift": __version__}
    _check_target(target, record["run"], own=target.absolute() == (run / "hf").absolute())
    with _naming_other_checkpoints(path):
        checkpoint = open_checkpoint(path)
    record |= {"step": checkpoint.step, "tokens": checkpoint.manifest.get("tokens"), "dtype": dtype}
    with _published(target) as partial, ThreadPoolExecutor(os.cpu_count()) as pool:
        checks = [pool.submit(checkpoint.verify, name) for name in checkpoint.manifest["files"]]
        if unused := _write_model_files(run, partial, dtype):
            say(f"not exported, no run of wikift wrote it: {', '.join(unused)} in {run / 'model'}")
        size = write_weights(checkpoint, partial, dtype, shard_bytes)
        for check in checks:  # what was written is published only if what was read is as it was saved
            with _naming_other_checkpoints(path):
                check.result()
        with _reading_config(run):
            card = model_card(run, config, checkpoint.manifest, dtype)
        # the generation configuration has no effect here, and like the card it is its owner's to change
        files = [file for file in sorted(partial.glob("*.*")) if file.name != "generation_config.json"]
        sums = pool.map(sha256_of, files)
        record["files"] = {file.name: sha256 for file, sha256 in zip(files, sums, strict=True)}
        (partial / "README.md").write_text(card, encoding="utf-8")
        _write_json(partial / EXPORT_RECORD, record)
    say(f"{target}: step {checkpoint.step:,} as {dtype}, {show_bytes(size)} of weights")


def _check_target(target: Path, identity: dict[str, Any], *, own: bool) -> None:
    """Raises UserError where `target` is something else than an export of this run; in its `own` hf/, any export."""
    if target.is_file():
        raise UserError(f"--out {target}: is a file; name a folder")
    if not target.exists() or not any(target.iterdir()):
        return
    record = read_json(target / EXPORT_RECORD)
    if record.get("format") != FORMAT or not isinstance(record.get("run"), dict):
        raise UserError(f"--out {target}: contains files that wikift did not export; name another folder, or move them")
    if record["run"] != identity and not own:
        name = record["run"].get("name")
        raise UserError(f"--out {target}: contains the model of another run ({name}); name another folder, or move it")


@contextlib.contextmanager
def _published(target: Path) -> Iterator[Path]:
    """A folder to write into; it becomes `target` when all went well, and is removed otherwise."""

    def refuse() -> None:
        raise EnvironmentFault(f"{target}: another process is writing it; run the command again when that has ended")

    try:
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        with (
            stopping_by_exception(),
            folder_lock(target, on_wait=refuse),
            publish_folder(target, replace=True) as partial,
        ):
            yield partial
    except OSError as error:
        raise EnvironmentFault(
            f"{target} was not made: {error.strerror or error}; free space, or name another --out. An earlier "
            "export there is unchanged"
        ) from None


@contextlib.contextmanager
def _reading_config(run: Path) -> Iterator[None]:
    """What a damaged config.json raises, as a message for the user."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{run / 'config.json'}: is damaged ({reason}); copy the run again") from None


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


def _write_model_files(run: Path, folder: Path, dtype: str) -> list[str]:
    """The run's model configuration with `dtype` set, its generation configuration and its tokenizer, without what
    names code to run. Returns the names of what else is in RUN/model, which no run put there."""
    source = run / "model"
    if (name := changed_file(source)) is not None:
        raise UserError(
            f"{source / name}: has changed since the run wrote it; copy it again, or remove {source / EXPORT_RECORD} "
            "if it was changed on purpose"
        )
    wanted = {source / CONFIG[0], *(path for name in (*CONFIG, *TOKENIZER) for path in source.glob(name))}
    for path in sorted(wanted):
        own = path.relative_to(source)
        if not path.is_file() or path.resolve() != source.resolve() / own:
            raise UserError(f"{path}: is missing or a link, not a file; the run is damaged: copy the file there")
        target = folder / own
        target.parent.mkdir(exist_ok=True)
        if path.name not in (*CONFIG, "tokenizer_config.json"):
            shutil.copyfile(path, target)
            continue
        try:
            content = parse_object(path.read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({one_line(error)}); the run is damaged") from None
        for name in ("auto_map", "custom_pipelines"):
            content.pop(name, None)
        if path.name == CONFIG[0]:
            content.pop("torch_dtype", None)  # transformers 4's name for it
            content = dict(sorted((content | {"dtype": dtype}).items()))
        _write_json(target, content)
    names = {EXPORT_RECORD, *(path.relative_to(source).parts[0] for path in wanted)}
    return sorted(path.name for path in source.iterdir() if path.name not in names)


def _write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")  # half a surrogate is JSON's escape then
