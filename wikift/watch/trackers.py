"""Weights & Biases and TensorBoard, views of metrics.jsonl. Each start replays what it has into them, so that nothing
is missing after a kill and no step is there twice.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import shutil
import typing
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from wikift.base.command import command_line
from wikift.base.errors import EnvironmentFault, one_line
from wikift.base.files import read_json
from wikift.base.folders import METRICS, SAMPLES, TENSORBOARD, WANDB_ID
from wikift.watch.record import read_metrics

_TRAIN = ("loss", "grad_norm", "learning_rate", "tokens", "skipped_steps")
_LOWEST = ("train/loss", "eval/loss", "eval/perplexity", "eval/word_perplexity")  # whose best value is the lowest

Samples = Sequence[dict[str, Any]]  # lines of samples.jsonl
Send = Callable[[int, dict[str, float], Samples], None]  # takes a step's numbers and samples, in order
Failed = Callable[[str], None]  # is told why nothing more is sent


@dataclass(frozen=True)
class Tracker:
    """Takes the lines of metrics.jsonl and samples.jsonl, in their order; `epoch` is the tokens of one."""

    send: Send
    epoch: int

    def record(self, values: dict[str, Any]) -> None:
        self.send(values["step"], grouped(values, self.epoch), ())

    def samples(self, step: int, rows: Samples) -> None:
        self.send(step, {"train/global_step": step}, rows)


def _refuse(text: str) -> NoReturn:
    raise EnvironmentFault(text)


@contextlib.contextmanager
def open_trackers(run: Path, names: Sequence[str], quiet: bool, failed: Failed = _refuse) -> Iterator[list[Tracker]]:
    """The trackers `names`, with all that the run's folder has. Raises EnvironmentFault where one does not start.

    `failed` is told of one that fails later.
    """
    config, by_step = read_json(run / "config.json"), dict[int, list[dict[str, Any]]]()
    try:
        samples, metrics = read_metrics(run / SAMPLES), read_metrics(run / METRICS)
    except OSError as error:
        raise EnvironmentFault(
            f"{run}: {METRICS} or {SAMPLES} cannot be read ({error.strerror}); check the disk, then run it again"
        ) from None
    for row in samples:
        by_step.setdefault(row["step"], []).append(row)
    lines = sorted([*({"step": step} for step in by_step), *metrics], key=lambda line: line["step"])
    with contextlib.ExitStack() as stack:
        wanted = [name for name in names if name != "wandb" or not wandb_disabled()]
        senders = [stack.enter_context(_OPEN[name](run, config, quiet, failed)) for name in wanted]
        trackers = [Tracker(send, tokens_of_epoch(config)) for send in senders]
        for tracker in trackers:
            for values in lines:
                if len(values) > 1:
                    tracker.record(values)
                else:
                    tracker.samples(values["step"], by_step[values["step"]])
        yield trackers


def grouped(values: dict[str, Any], epoch: int) -> dict[str, float]:
    """The numbers of a line by the names that Trainer gives them: train/loss, eval/loss; system/ has the rest."""
    named = {"train/global_step": values["step"]}
    if "event" in values:
        return {**named, f"health/{values['event']}": 1}
    for key, value in values.items():
        if key != "step" and isinstance(value, (int, float)) and math.isfinite(value):
            group = "eval" if key.startswith("eval_") else "train" if key in _TRAIN else "system"
            named[f"{group}/{key.removeprefix('eval_')}"] = value
    if "tokens" in values:
        named["train/epoch"] = values["tokens"] / epoch
    return named


def send_model(folder: Path) -> None:
    """Upload a model's folder to the run of Weights & Biases that is open, as an artifact."""
    import wandb

    artifact = wandb.Artifact(f"{folder.absolute().parent.name}-hf", "model")
    artifact.add_dir(str(folder))
    wandb.log_artifact(artifact)


@contextlib.contextmanager
def _open_wandb(run: Path, config: dict[str, Any], quiet: bool, failed: Failed) -> Iterator[Send]:
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
    next_step, code = started.step, 1  # the server has what is before
    attempt = _until_it_fails(run, failed)

    def send(step: int, numbers: dict[str, float], samples: Samples) -> None:
        def log() -> None:
            rows = [list(row.values()) for row in samples]
            table = {"samples": wandb.Table(columns=["step", "prompt", "text"], data=rows)} if rows else {}
            started.log({**numbers, **table}, step=step)

        if step >= next_step:
            attempt(log)

    try:
        yield send
        code = 0
    finally:
        attempt(lambda: started.finish(exit_code=code))


def _until_it_fails(run: Path, failed: Failed) -> Callable[[Callable[[], None]], None]:
    """What calls a function of wandb's, whose service is another process, until one raises; that is told once."""
    lost = False

    def attempt(call: Callable[[], None]) -> None:
        nonlocal lost
        try:
            if not lost:
                call()
        except Exception as error:
            import wandb

            lost = True
            with contextlib.suppress(Exception):
                wandb.teardown()  # else it complains at the end
            failed(
                f"Weights & Biases failed ({one_line(error)}), and gets nothing more; the next start, or "
                f"{command_line('log')} {shlex.quote(str(run))} --to wandb, sends all of it"
            )

    return attempt


@contextlib.contextmanager
def _open_tensorboard(run: Path, config: dict[str, Any], quiet: bool, failed: Failed) -> Iterator[Send]:
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(run / TENSORBOARD, ignore_errors=True)
    with SummaryWriter(run / TENSORBOARD) as writer:
        writer.add_text("config", f"```json\n{json.dumps(config, indent=1)}\n```")

        def send(step: int, numbers: dict[str, float], samples: Samples) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)
            if samples:
                texts = (f"**{row['prompt']}**{row['text']}" for row in samples)
                writer.add_text("samples", "\n\n---\n\n".join(texts), step)

        yield send


_OPEN: dict[str, Callable[[Path, dict[str, Any], bool, Failed], AbstractContextManager[Send]]]
_OPEN = {"wandb": _open_wandb, "tensorboard": _open_tensorboard}


def wandb_disabled() -> bool:
    """Whether WANDB_DISABLED is set, as Trainer reads it."""
    return os.environ.get("WANDB_DISABLED", "").lower() in ("1", "on", "yes", "true")


def tokens_of_epoch(config: dict[str, Any]) -> int:
    derived = config.get("derived", {})
    return derived.get("blocks", 0) * derived.get("block_size", 0) or 1
