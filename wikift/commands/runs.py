"""The runs command: which runs a folder has and how far they are; and the checkpoints that nobody needs removed."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from wikift.base import folders
from wikift.base.command import command_line
from wikift.base.console import print
from wikift.base.errors import EXIT_DONE, UserError
from wikift.base.files import show_bytes
from wikift.checkpoint.reader import best_checkpoint, prune
from wikift.settings.options import parse_all
from wikift.settings.run_fields import RunsSettings
from wikift.training.resume import clear_leftovers
from wikift.watch.record import RunRecord, aligned, folder_bytes, is_running, read_run, told_of_damage


@told_of_damage()
def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    parsed = parse_all(RunsSettings, argv)
    runs, settings = parsed.checked(_check), parsed.settings
    head = ("run", "state", "step", "best loss", "size", "last sign of life")
    print(
        aligned([head, *map(_row, runs)])
        if runs
        else f"no run in {settings.folder}; {command_line('train')} makes one, and FOLDER names another folder"
    )
    if settings.prune:
        _prune(runs, settings)
    return EXIT_DONE


def _check(settings: RunsSettings) -> list[RunRecord]:
    folder, problems = Path(settings.folder), []
    if not folder.is_dir() and settings.folder != RunsSettings().folder:
        problems.append(f"FOLDER {folder}: no such folder; name the one that the runs' folders are in")
    if settings.prune and not settings.yes and not sys.stdin.isatty():
        problems.append("--prune: asks before it removes anything, and nobody is there to answer; add --yes")
    if problems:
        raise UserError(*problems)
    found_runs = [path for path in (folder, *sorted(folder.glob("*"))) if folders.is_run(path)]
    return [read_run(path, str(path)) for path in found_runs]


def _row(run: RunRecord) -> tuple[str, ...]:
    best = f"{run.best[1]:.4f}" if run.best else ""
    written = [run.path / folders.METRICS, run.path / "config.json", *folders.list_checkpoints(run.path)]
    seconds = time.time() - max(path.stat().st_mtime for path in written if path.exists())
    steps = f"{run.done:,}/{run.derived.get('steps', 0):,}"
    return run.name, run.state, steps, best, show_bytes(folder_bytes(run.path)), f"{_age(seconds)} ago"


def _age(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"


def _prune(runs: Sequence[RunRecord], settings: RunsSettings) -> None:
    """Show what goes, ask, and remove it; a run that is written to is left alone."""
    idle = [run.path for run in runs if not is_running(run.path)]
    for path in idle:
        clear_leftovers(path)  # of this command too, where it was killed
    spare = {run: [p for p in folders.list_checkpoints(run)[:-1] if p != best_checkpoint(run)] for run in idle}
    paths = [path for checkpoints in spare.values() for path in checkpoints]
    if not paths:
        print("\nnothing to remove: each run has its newest checkpoint and its best, or is running")
        return
    print("", *(f"{path}  {show_bytes(folder_bytes(path))}" for path in paths), sep="\n")
    total = show_bytes(sum(map(folder_bytes, paths)))
    if not settings.yes and not input(f"remove {len(paths)} checkpoints, {total}? [y/N] ").lower().startswith("y"):
        print("nothing is removed")
        return
    for run, checkpoints in spare.items():
        if checkpoints and not is_running(run):
            prune(run, 1)
    print(f"removed: {total}")
