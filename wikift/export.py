"""A checkpoint to a standard Hugging Face directory, tensor by tensor: memory is one tensor, whatever the model.

The directory is written beside its place (`.hf.partial`), read back, and renamed in; an earlier export of the same run
is renamed out and deleted after that, so a reader sees a whole one or none. Cost: the checkpoint is read once to verify
its checksums, its weights once more to be written.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from wikift import __version__, folders, hub
from wikift.card import model_card
from wikift.cli import parse
from wikift.command import EXIT_DONE
from wikift.config import ConsolidateSettings
from wikift.derive import ranks_started
from wikift.disk import sync_folder
from wikift.errors import EnvironmentFault, UserError
from wikift.publish import stopping_by_exception
from wikift.sizes import parse_size, show_bytes

FORMAT = "wikift-export-1"


def main(argv: Sequence[str]) -> int:
    """launch/consolidate.py."""
    settings = parse(
        ConsolidateSettings,
        argv,
        prog="launch/consolidate.py",
        description="Make a standard Hugging Face directory of a run's newest (or best, or a given) checkpoint.",
        epilog="examples:\n  python launch/consolidate.py runs/gpt2-wikitext-2-v1\n"
        "  python launch/consolidate.py runs/gpt2-wikitext-2-v1 --best --dtype bfloat16 --out models/small",
    )
    if settings.run is None:
        raise UserError("RUN_OR_CHECKPOINT: is missing; name a run, runs/NAME, or one checkpoint of it")
    if ranks_started() > 1:
        raise UserError(f"torchrun: started {ranks_started()} processes, this is work for one; start it with python")
    say = (lambda text: None) if settings.quiet else print
    out = export(
        Path(settings.run),
        Path(settings.out) if settings.out else None,
        step=settings.step,
        best=settings.best,
        dtype=settings.dtype,
        max_shard_size=settings.max_shard_size,
        say=say,
    )
    say(f"next:  python launch/evaluate.py {out}\n       python launch/generate.py {out}")
    return EXIT_DONE


def export(
    run_or_checkpoint: Path,
    out: Path | None,
    *,
    step: int | None,
    best: bool,
    dtype: str,
    max_shard_size: str,
    say: Callable[[str], None],
) -> Path:
    """Export one checkpoint to `out` (RUN/hf where None) and return that folder.

    Raises UserError for what was asked for wrongly or is damaged, EnvironmentFault where the disk is full or cannot be
    written; in both cases an earlier export at `out` still stands.
    """
    from_checkpoint = folders.is_checkpoint(run_or_checkpoint)
    run = run_or_checkpoint.absolute().parent.parent if from_checkpoint else run_or_checkpoint
    shard_bytes = 0
    problems: list[str] = []
    try:
        shard_bytes = parse_size(max_shard_size)
    except UserError as error:
        problems += error.problems
    if step is not None and best:
        problems.append(f"--step {step}: cannot act beside --best; leave one of the two out")
    if from_checkpoint and (step is not None or best):
        problems.append(
            f"{'--best' if best else '--step'}: cannot act, {run_or_checkpoint} is one checkpoint; name the run"
        )
    if not from_checkpoint and not run.is_dir():
        problems.append(f"{run}: no such folder; name a run, runs/NAME, or one checkpoint of it")
    if problems:
        raise UserError(*problems)
    config = folders.run_config(run)
    path = run_or_checkpoint if from_checkpoint else _choose(run, step, best)
    target = run / "hf" if out is None else out
    record: dict[str, Any] = {"format": FORMAT, "run": _identity(run, config), "wikift": __version__}
    _check_target(target, record["run"], own=target.absolute() == (run / "hf").absolute())

    from wikift.checkpoint import open_checkpoint
    from wikift.weights import write_weights

    checkpoint = open_checkpoint(path, verify=True)
    record |= {"step": checkpoint.step, "tokens": checkpoint.manifest.get("tokens"), "dtype": dtype}
    with stopping_by_exception(), _published(target) as partial:
        _write_model_files(run, partial, dtype)
        weights = write_weights(checkpoint, partial, dtype, shard_bytes)
        (partial / "README.md").write_text(model_card(run, config, checkpoint.manifest, dtype), encoding="utf-8")
        _write_json(partial / folders.EXPORT_RECORD, record)
    say(f"{target}: step {checkpoint.step:,} as {dtype}, {show_bytes(weights)} of weights")
    return target


def model_source(name: str, say: Callable[[str], None]) -> str:
    """The directory or Hub name to load for `name`; a run without `hf` is exported first.

    Raises UserError where there are no trained weights.
    """
    run = Path(name)
    if not folders.has_model(name):
        what = "has no checkpoint yet" if folders.is_run(run) else "no such folder, and no name of the Hub"
        raise UserError(f"{name}: {what}; train it first: python launch/train.py --output-dir {name}")
    if not run.exists():
        hub.offline_if_unreachable()  # else the libraries try for half a minute, even where all is cached
        return name
    if folders.is_model(run):
        return name
    steps, target = folders.checkpoint_steps(run), run / "hf"
    if not folders.is_model(target):
        export(run, None, step=None, best=False, dtype="float32", max_shard_size="5GB", say=say)
    else:
        step = folders.read_json(target / folders.EXPORT_RECORD).get("step")
        if steps and isinstance(step, int) and step < steps[-1]:
            say(f"{target} is of step {step}, the run has come to {steps[-1]}: python launch/consolidate.py {run}")
    return str(target)


def _choose(run: Path, step: int | None, best: bool) -> Path:
    """The checkpoint asked for. Raises UserError listing what there is."""
    steps = folders.checkpoint_steps(run)
    if not steps:
        raise UserError(f"{run}: has no checkpoint yet; train on: python launch/train.py --output-dir {run}")
    if step is not None:
        if step not in steps:
            raise UserError(
                f"--step {step}: is not among the checkpoints of {run}: {', '.join(map(str, steps))}; take one of these"
            )
        return folders.checkpoint_path(run, step)
    if not best:
        return folders.checkpoint_path(run, steps[-1])
    from wikift.checkpoint import best_checkpoint

    found = best_checkpoint(run)
    if found is None:
        listed = ", ".join(map(str, steps))
        raise UserError(f"--best: no checkpoint of {run} was validated; leave it out, or name a --step of {listed}")
    return found


def _identity(run: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What tells this run's exports from another's: its name, seed, model and text."""
    settings = config["settings"]
    splits = config.get("store", {}).get("splits", {})
    return {
        "name": run.absolute().name,
        "seed": settings["seed"],
        "model": None if settings["from_scratch"] else settings["model"],
        "data": {name: split.get("sha256") for name, split in splits.items()},
    }


def _check_target(target: Path, identity: Any, *, own: bool) -> None:
    """Raises UserError where something lies at `target` that is not an export of this run (in RUN/hf: any export)."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir():
        raise UserError(f"--out {target}: is a file; name a folder")
    try:
        there = json.loads((target / folders.EXPORT_RECORD).read_text(encoding="utf-8"))
        found = there["run"] if there["format"] == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError):
        found = None
    if found is None:
        raise UserError(
            f"--out {target}: holds something that wikift did not export; name another folder or move it away"
        )
    if found != identity and not own:
        name = found.get("name") if isinstance(found, dict) else found
        raise UserError(f"--out {target}: holds the model of another run ({name}); name another folder or move it away")


@contextlib.contextmanager
def _published(target: Path) -> Iterator[Path]:
    """A folder to write into; it becomes `target` when all went well and is gone otherwise."""
    partial = target.absolute().with_name(f".{target.absolute().name}.partial")
    old = partial.with_suffix(".old")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(partial, os.O_RDONLY)
    except OSError as error:
        raise EnvironmentFault(
            f"{target}: cannot be made ({error.strerror}); name another --out, nothing was changed"
        ) from None
    try:
        if not _is_ours(lock, partial):
            raise EnvironmentFault(f"{target}: another process is making it at this moment; try again after it")
        try:
            if old.exists() and not target.exists():  # one that was killed between its two renames
                os.rename(old, target)
            for left in [*partial.iterdir(), *([old] if old.exists() else [])]:  # of one that was killed
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield partial
            _swap(partial, target, old)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError):
                free = shutil.disk_usage(partial.parent).free
                raise EnvironmentFault(
                    f"{target} was not made: {error.strerror or error} ({show_bytes(free)} are free there); "
                    "make room or name another --out. What was there before still is"
                ) from None
            raise
    finally:
        os.close(lock)
    shutil.rmtree(old, ignore_errors=True)


def _is_ours(lock: int, partial: Path) -> bool:
    """Take the lock on the open folder `partial`; False where another process has it, or has just published it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return partial.exists() and partial.stat().st_ino == os.fstat(lock).st_ino


def _swap(partial: Path, target: Path, old: Path) -> None:
    for path in (*partial.iterdir(), partial):
        sync_folder(path)
    if target.exists() and any(target.iterdir()):
        os.rename(target, old)
        try:
            os.rename(partial, target)
        except OSError:
            os.rename(old, target)
            raise
    else:
        os.rename(partial, target)
    sync_folder(partial.parent)


def _write_model_files(run: Path, folder: Path, dtype: str) -> None:
    """The run's configuration with `dtype` set, and its generation configuration and tokenizer as they are."""
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
