"""The log command: metrics.jsonl replayed into a tracker or a table. Twice does what once does."""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Sequence
from pathlib import Path

from wikift.base import folders
from wikift.base.console import print
from wikift.base.errors import EXIT_DONE, UserError
from wikift.base.files import faults_of_writing, replace_text
from wikift.settings.checks import tracker_problems
from wikift.settings.options import parse_all
from wikift.settings.run_fields import LogSettings
from wikift.watch.record import RunRecord, is_running, read_run, told_of_damage
from wikift.watch.trackers import open_trackers, send_model, wandb_disabled


@told_of_damage()
def main(argv: Sequence[str]) -> int:
    parsed = parse_all(LogSettings, argv)
    run, settings = parsed.checked(_check), parsed.settings
    with faults_of_writing(run.path):
        if settings.to == "csv":
            target = run.path / "metrics.csv"
            replace_text(target, _as_csv(run))
        else:
            target = run.path / settings.to
            with open_trackers(run.path, [settings.to], quiet=False):
                if settings.model:
                    send_model(run.path / "hf")
    print(f"{len(run.rows):,} steps: {target}")
    return EXIT_DONE


def _check(settings: LogSettings) -> RunRecord:
    if settings.run is None:
        raise UserError("RUN: required; name a run, runs/NAME")
    run, problems = read_run(Path(settings.run)), list[str]()
    if settings.to == "wandb" and wandb_disabled():
        problems.append("--to wandb: has no effect while WANDB_DISABLED is set; unset it")
    if settings.to != "csv":
        problems += tracker_problems("--to", [settings.to])
        if is_running(run.path):
            problems.append(f"RUN {run.path}: is running, and its files there may be open; wait for its end")
    if settings.model and settings.to != "wandb":
        problems.append(f"--model: has no effect with --to {settings.to}; omit it")
    elif settings.model and not folders.is_model(run.path / "hf"):
        problems.append(
            f"--model: {run.path / 'hf'} is no model; make it: wikift consolidate {shlex.quote(str(run.path))}"
        )
    if problems:
        raise UserError(*problems)
    return run


def _as_csv(run: RunRecord) -> str:
    names = dict.fromkeys(name for row in run.rows for name in row)
    file = io.StringIO()
    table = csv.DictWriter(file, list(names), lineterminator="\n")
    table.writeheader()
    table.writerows(run.rows)
    return file.getvalue()
