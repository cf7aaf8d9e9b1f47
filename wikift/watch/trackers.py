"""Weights & Biases and TensorBoard, views of metrics.jsonl. Each start replays what it has into them, so that nothing
is missing after a kill and no step is there twice.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import typing
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from wikift.base.errors import EnvironmentFault, one_line
from wikift.base.files import read_json
from wikift.base.folders import METRICS, SAMPLES, TENSORBOARD, WANDB_ID
from wikift.watch.record import read_metrics

_TRAIN = ("loss", "grad_norm", "learning_rate", "tokens", "skipped_steps")
_LOWEST = ("train/loss", "eval/loss", "eval/perplexity", "eval/word_perplexity")  # whose best value is the lowest


class Tracker(Protocol):
    """Takes the lines of metrics.jsonl and samples.jsonl, in their order."""

    def record(self, values: dict[str, Any]) -> None: ...
    def samples(self, step: int, rows: Sequence[dict[str, Any]]) -> None: ...


class WandbRun:
    """A run of Weights & Biases that has started."""

    def __init__(self, started: Any, epoch: int) -> None:
        self.started, self.epoch = started, epoch
        self.next_step = started.step  # the server has those before

    def record(self, values: dict[str, Any]) -> None:
        if values["step"] >= self.next_step:
            self.started.log(grouped(values, self.epoch), step=values["step"])

    def samples(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        """A table of what the model wrote."""
        import wandb

        if step >= self.next_step:
            table = wandb.Table(columns=["step", "prompt", "text"], data=[list(row.values()) for row in rows])
            self.started.log({"samples": table}, step=step)

    def model(self, folder: Path) -> None:
        """Upload a model's folder as an artifact."""
        import wandb

        artifact = wandb.Artifact(f"{folder.absolute().parent.name}-hf", "model")
        artifact.add_dir(str(folder))
        self.started.log_artifact(artifact)


class TensorBoardRun:
    """Event files of TensorBoard's."""

    def __init__(self, writer: Any, epoch: int) -> None:
        self.writer, self.epoch = writer, epoch

    def record(self, values: dict[str, Any]) -> None:
        for name, value in grouped(values, self.epoch).items():
            self.writer.add_scalar(name, value, values["step"])

    def samples(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        texts = (f"**{row['prompt']}**{row['text']}" for row in rows)
        self.writer.add_text("samples", "\n\n---\n\n".join(texts), step)


def grouped(values: dict[str, Any], epoch: int) -> dict[str, float]:
    """The numbers of a line by the names that Trainer gives them: train/loss, eval/loss; system/ has the rest.

    `epoch` is the tokens of one.
    """
    step = values["step"]
    if "event" in values:
        return {"train/global_step": step, f"health/{values['event']}": 1}
    named = {"train/global_step": step}
    for key, value in values.items():
        if key != "step" and isinstance(value, (int, float)) and math.isfinite(value):
            group, name = (
                ("eval", key[5:]) if key.startswith("eval_") else ("train" if key in _TRAIN else "system", key)
            )
            named[f"{group}/{name}"] = value
    if "tokens" in values:
        named["train/epoch"] = values["tokens"] / epoch
    return named


@contextlib.contextmanager
def open_trackers(run: Path, names: Sequence[str], quiet: bool) -> Iterator[list[Tracker]]:
    """The trackers `names` with all that the run's folder has. Raises EnvironmentFault where one does not start."""
    lines: list[tuple[int, int, Any]] = [(row["step"], 1, row) for row in read_metrics(run / METRICS)]
    by_step: dict[int, list[dict[str, Any]]] = {}
    for row in read_metrics(run / SAMPLES):
        by_step.setdefault(row["step"], []).append(row)
    lines += [(step, 0, rows) for step, rows in by_step.items()]
    with contextlib.ExitStack() as stack:
        wanted = [name for name in names if name != "wandb" or not wandb_disabled()]
        trackers = [stack.enter_context(_OPEN[name](run, read_json(run / "config.json"), quiet)) for name in wanted]
        for tracker in trackers:
            for step, kind, row in sorted(lines, key=lambda line: line[:2]):
                tracker.record(row) if kind else tracker.samples(step, row)
        yield trackers


@contextlib.contextmanager
def _open_wandb(run: Path, config: dict[str, Any], quiet: bool) -> Iterator[WandbRun]:
    """Start or continue the folder's run; WANDB_RUN_ID names another. Its library reads WANDB_TAGS and the like."""
    import wandb

    # its copy of the terminal would hold every frame of the live view
    chosen = wandb.Settings(console="off")
    if quiet:
        chosen.silent = True
    file, swept = run / WANDB_ID, "WANDB_SWEEP_ID" in os.environ  # a sweep's agent decides project and run
    kept = file.read_text().strip() if file.exists() else uuid.uuid4().hex[:12]
    identity = os.environ.get("WANDB_RUN_ID", kept)
    unsent = [path for path in run.glob(f"wandb/offline-run-*-{identity}") if not [*path.glob("*.synced")]]
    try:
        started = wandb.init(
            project=None if swept else os.environ.get("WANDB_PROJECT", "wikift"),
            name=os.environ.get("WANDB_NAME", run.absolute().name),
            id=None if swept else identity,
            resume=typing.cast(Any, os.environ.get("WANDB_RESUME", "allow")),
            dir=run,
            config={
                **config.get("settings", {}),
                **{k: v for k, v in config.items() if k not in ("settings", "store")},
            },
            settings=chosen,
        )
    except Exception as error:
        raise EnvironmentFault(
            f"Weights & Biases did not start ({one_line(error, 200)}); set WANDB_MODE=offline, run `wandb login`, or "
            "omit --wandb (wikift log sends a run later)"
        ) from None
    file.write_text(started.id)
    for path in unsent:  # all that it has comes again, and `wandb sync --sync-all` would send it twice
        path.rename(path.with_name(f"replayed-{path.name}"))
    for name in ("train/global_step", "train/tokens", "train/epoch"):
        started.define_metric(name)
    started.define_metric("*", step_metric="train/global_step", step_sync=True)
    for name in _LOWEST:
        started.define_metric(name, step_metric="train/global_step", summary="min")
    code = 1
    try:
        yield WandbRun(started, tokens_of_epoch(config))
        code = 0
    finally:
        started.finish(exit_code=code)


@contextlib.contextmanager
def _open_tensorboard(run: Path, config: dict[str, Any], quiet: bool) -> Iterator[TensorBoardRun]:
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(run / TENSORBOARD, ignore_errors=True)
    with SummaryWriter(run / TENSORBOARD) as writer:
        writer.add_text("config", f"```json\n{json.dumps(config, indent=1)}\n```")
        yield TensorBoardRun(writer, tokens_of_epoch(config))


_OPEN: dict[str, Callable[[Path, dict[str, Any], bool], AbstractContextManager[Tracker]]]
_OPEN = {"wandb": _open_wandb, "tensorboard": _open_tensorboard}


def wandb_disabled() -> bool:
    """Whether WANDB_DISABLED is set, as Trainer reads it."""
    return os.environ.get("WANDB_DISABLED", "").lower() in ("1", "on", "yes", "true")


def tokens_of_epoch(config: dict[str, Any]) -> int:
    derived = config.get("derived", {})
    return derived.get("blocks", 0) * derived.get("block_size", 0) or 1
