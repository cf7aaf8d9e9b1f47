"""The settings of the commands that look at runs: plan, report, compare, runs and log. As fields.py, for the others."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from wikift.base.names import TRACKERS
from wikift.settings.fields import TrainSettings
from wikift.settings.options import option

_argument, _plan = partial(option, group="arguments"), partial(option, group="plan")


@dataclass(frozen=True)
class PlanSettings(TrainSettings):
    """The plan command: what a training would be, need and take. The settings of train, and for which machine."""

    gpus: int | None = _plan(None, "plan for as many GPUs, that need not be here", shown="what is here")
    gpu_memory: str | None = _plan(None, "memory of each GPU: 80GB", "SIZE", shown="what is free here")
    gpu: str | None = _plan(None, "with --mfu, what the GPUs are: H100, A100, ...", "NAME", shown="what is here")
    mfu: float | None = _plan(None, "compute the time from this fraction of the GPUs' peak FLOP/s", "0..1")
    trial: int | None = _plan(None, "measure the time: train as many steps here, and keep nothing", "STEPS")
    find_lr: bool = _plan(False, "let the learning rate rise in the trial (100 steps) and propose one")


@dataclass(frozen=True)
class ReportSettings:
    """The report command: runs as one HTML file."""

    runs: tuple[str, ...] = _argument((), "runs' folders; several are laid over each other", "RUN")
    out: str | None = option(None, "the file to write", "FILE", shown="RUN/report.html; report.html for several runs")
    png: bool = option(False, "also a picture of its beginning, FILE with .png, by a Chromium that is installed")
    text: bool = option(False, "print the tables as text, write no file")


@dataclass(frozen=True)
class CompareSettings:
    """The compare command: whether two runs came to the same."""

    runs: tuple[str, ...] = _argument((), "two runs' folders", "RUN")
    within: float = option(0.01, "the largest difference that counts as equal, in nats (of ln perplexity)", "NATS")


@dataclass(frozen=True)
class RunsSettings:
    """The runs command: which runs there are."""

    folder: str = _argument("runs", "the folder that the runs' folders are in", "FOLDER")
    prune: bool = option(False, "remove all checkpoints but each run's newest and best, after asking")
    yes: bool = option(False, "with --prune: do not ask")


@dataclass(frozen=True)
class LogSettings:
    """The log command: a run's metrics into a tracker or a table, again and whole."""

    run: str | None = _argument(None, "a run's folder", "RUN")
    to: str = option("csv", "where to", choices=(*TRACKERS, "csv"), shown="csv: RUN/metrics.csv")
    model: bool = option(False, "with --to wandb: upload RUN/hf too, as an artifact")
