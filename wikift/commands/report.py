"""The report command: runs as one self-contained HTML file, or as text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from wikift.base.console import print
from wikift.base.errors import EXIT_DONE
from wikift.base.files import faults_of_writing, replace_text
from wikift.base.folders import REPORT
from wikift.settings.fields import TrainSettings
from wikift.settings.options import ROLES, names_by_role, parse_all
from wikift.settings.run_fields import ReportSettings
from wikift.watch.record import RunRecord, read_runs
from wikift.watch.report import as_html, as_text

ROLES_OF_SETTINGS = {role: names_by_role(TrainSettings, role) for role in ROLES}


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    parsed = parse_all(
        ReportSettings,
        argv,
        prog="wikift report",
        description="One HTML file of a run, or of several laid over each other: curves, settings, samples, scores. It "
        "needs no network.",
        epilog="examples:\n  wikift report runs/gpt2-wikitext-2-v1\n  wikift report runs/* --out all.html\n"
        "  wikift report runs/a runs/b --text",
    )
    runs, settings = parsed.checked(_check), parsed.settings
    if settings.text:
        print(as_text(runs, ROLES_OF_SETTINGS))
        return EXIT_DONE
    out = Path(settings.out or (runs[0].path / REPORT if len(runs) == 1 else REPORT))
    with faults_of_writing(out):
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        page = as_html(runs, ROLES_OF_SETTINGS)
        replace_text(out, page.encode("utf-8", "replace").decode("utf-8"))  # a name may be no text
    print(f"report: {out}")
    return EXIT_DONE


def _check(settings: ReportSettings) -> list[RunRecord]:
    problems = [] if settings.runs else ["RUN: required; name one or several runs, runs/NAME"]
    if settings.text and settings.out:
        problems.append(f"--out {settings.out}: has no effect with --text; omit one of the two")
    return read_runs(settings.runs, problems)
