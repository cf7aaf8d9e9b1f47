"""A checkpoint to a standard Hugging Face directory, tensor by tensor: memory is one tensor, whatever the model.

The directory is written beside its place (`.hf.partial`), read back, and renamed in; an earlier export of the same run
is renamed out and deleted after that, so a reader sees a whole one or none. Cost: the checkpoint is read once to verify
its checksums, by threads beside the writing, its weights once more to be written.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from wikift import __version__, peer
from wikift.average import last_checkpoints, mean_weights, verdict
from wikift.base import folders, hub
from wikift.base.errors import UserError
from wikift.base.signals import stopping_by_exception
from wikift.base.sizes import parse_size, show_bytes
from wikift.checkpoint.reader import Checkpoint, best_checkpoint, open_checkpoint
from wikift.commands.main import EXIT_DONE
from wikift.export.card import Mean, model_card
from wikift.export.folder import FORMAT, check_target, published, write_json
from wikift.export.weights import checkpoint_weights, write_weights
from wikift.settings.fields import ConsolidateSettings
from wikift.settings.options import parse
from wikift.settings.run_plan import ranks_started


def main(argv: Sequence[str]) -> int:
    """launch/consolidate.py."""
    settings = parse(
        ConsolidateSettings,
        argv,
        prog="launch/consolidate.py",
        description="Make a standard Hugging Face directory of a run's newest (or best, or a given) checkpoint, or of "
        "one that DeepSpeed (ZeRO 1 to 3) or torch.distributed.checkpoint wrote.",
        epilog="examples:\n  python launch/consolidate.py runs/gpt2-wikitext-2-v1\n"
        "  python launch/consolidate.py runs/gpt2-wikitext-2-v1 --best --dtype bfloat16 --out models/small\n"
        "  python launch/consolidate.py runs/gpt2-wikitext-2-v1 --average-last 4\n"
        "  python launch/consolidate.py their-run/global_step500 --model gpt2 --out models/theirs",
    )
    if settings.run is None:
        raise UserError("RUN_OR_CHECKPOINT: is missing; name a run, runs/NAME, or one checkpoint of it")
    if ranks_started() > 1:
        raise UserError(f"torchrun: started {ranks_started()} processes, this is work for one; start it with python")
    say = (lambda text: None) if settings.quiet else print
    source, target = Path(settings.run), Path(settings.out) if settings.out else None
    words: dict[str, Any] = {"step": settings.step, "best": settings.best, "dtype": settings.dtype, "say": say}
    words["max_shard_size"] = settings.max_shard_size
    average = settings.average_last
    if not folders.is_run(source) and not folders.is_checkpoint(source) and peer.is_peer(source):
        if average is not None:
            raise UserError(f"--average-last {average}: cannot act, {source} is one checkpoint; leave it out")
        out = peer.export_peer(source, target, model=settings.model, **words)
    elif settings.model is not None:
        raise UserError(f"--model {settings.model}: cannot act, a run of wikift knows its model; leave it out")
    else:
        out = export(source, target, average_last=average, **words)
    run = source.absolute().parent.parent if folders.is_checkpoint(source) else source
    known = folders.run_of(str(out)) is not None
    data = "" if known else f" --data {folders.read_json(run / 'config.json').get('store_path', 'STORE')}"
    say(f"next:  python launch/evaluate.py {out}{data}\n       python launch/generate.py {out}")
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
    average_last: int | None = None,
) -> Path:
    """Export one checkpoint, or the mean of the last ones, to `out` (RUN/hf where None) and return that folder.

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
    if average_last is not None and average_last < 2:
        problems.append(f"--average-last {average_last}: must be 2 or more; leave it out for the last checkpoint")
    if average_last is not None and (step is not None or best):
        other = "--best" if best else f"--step {step}"
        problems.append(f"--average-last {average_last}: cannot act beside {other}; leave one of the two out")
    if from_checkpoint and (step is not None or best or average_last is not None):
        asked = "--best" if best else "--step" if step is not None else f"--average-last {average_last}"
        problems.append(f"{asked}: cannot act, {run_or_checkpoint} is one checkpoint; name the run")
    if not from_checkpoint and not run.is_dir():
        problems.append(f"{run}: no such folder; name a run, runs/NAME, or one checkpoint of it")
    if problems:
        raise UserError(*problems)
    config = folders.run_config(run)
    path = run_or_checkpoint if from_checkpoint else _choose(run, step, best, say)
    averaged = last_checkpoints(run, config, average_last) if average_last is not None else []
    target = run / "hf" if out is None else out
    record: dict[str, Any] = {"format": FORMAT, "run": _identity(run, config), "wikift": __version__}
    check_target(target, record["run"], own=target.absolute() == (run / "hf").absolute())

    checkpoint = _opened(path, run)
    read = averaged or [checkpoint]
    tied = checkpoint.manifest["model_config"].get("tie_word_embeddings", True)
    record |= {"step": checkpoint.step, "tokens": checkpoint.manifest.get("tokens"), "dtype": dtype}
    with stopping_by_exception(), published(target) as partial, ThreadPoolExecutor(os.cpu_count()) as pool:
        checks = [pool.submit(each.verify, name) for each in read for name in each.manifest["files"]]
        _write_model_files(run, partial, dtype)
        source = mean_weights(averaged) if averaged else checkpoint_weights(checkpoint)
        weights = write_weights(source, partial, dtype, shard_bytes, tied=tied)
        for check in checks:  # what was written is published only if what was read is as it was saved
            with _other_checkpoints(path, run):
                check.result()
        mean = None
        if averaged:
            record["averaged"] = [each.step for each in averaged]
            mean = Mean(record["averaged"], verdict(partial, run, config, checkpoint))
            say(mean.verdict)
        card = model_card(run, config, checkpoint.manifest, dtype, mean)
        (partial / "README.md").write_text(card, encoding="utf-8")
        write_json(partial / folders.EXPORT_RECORD, record)
    what = f"the mean of steps {', '.join(map(str, record['averaged']))}" if averaged else f"step {checkpoint.step:,}"
    say(f"{target}: {what} as {dtype}, {show_bytes(weights)} of weights")
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


def _choose(run: Path, step: int | None, best: bool, say: Callable[[str], None]) -> Path:
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
    found = best_checkpoint(run)
    if found is None:
        listed = ", ".join(map(str, steps))
        raise UserError(f"--best: no checkpoint of {run} was validated; leave it out, or name a --step of {listed}")
    _say_what_was_better(run, folders.read_json(found / "manifest.json")["eval_loss"], say)
    return found


def _say_what_was_better(run: Path, saved: float, say: Callable[[str], None]) -> None:
    from wikift.watch.log import read_metrics

    losses = {values["step"]: values.get("eval_loss") for values in read_metrics(run / "metrics.jsonl")}
    better = {step: loss for step, loss in losses.items() if loss is not None and loss < saved}
    if better:
        step = min(better, key=lambda step: better[step])
        say(
            f"step {step} was better ({better[step]:.4f} against {saved:.4f}), but no checkpoint was made there; train "
            "with --save-steps as small as --eval-steps, or with --early-stopping-patience, which keeps the best"
        )


def _opened(path: Path, run: Path) -> Checkpoint:
    with _other_checkpoints(path, run):
        return open_checkpoint(path)


@contextlib.contextmanager
def _other_checkpoints(path: Path, run: Path) -> Iterator[None]:
    """A checkpoint that is damaged is no end: its run may have others."""
    try:
        yield
    except UserError as error:
        others = [
            step for step in folders.checkpoint_steps(run) if path.name != folders.checkpoint_path(run, step).name
        ]
        way_out = f"; another: --step {others[-1]}" if others else "; the run has no other checkpoint"
        raise UserError(*(problem + way_out for problem in error.problems)) from None


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


def _write_model_files(run: Path, folder: Path, dtype: str) -> None:
    """The run's configuration with `dtype` set, and its generation configuration and tokenizer as they are."""
    source = run / "model"
    try:
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: the model's config.json cannot be read ({error}); the run is damaged") from None
    config["dtype"] = dtype
    config.pop("torch_dtype", None)  # transformers 4's name for it
    write_json(folder / "config.json", dict(sorted(config.items())))
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name not in ("config.json", "README.md") and path.suffix != ".safetensors":
            shutil.copyfile(path, folder / path.name)
