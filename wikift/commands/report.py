"""The report command: runs as one self-contained HTML file, or as text."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from wikift.base.console import print
from wikift.base.errors import EXIT_DONE, EnvironmentFault
from wikift.base.files import faults_of_writing, replace_text
from wikift.base.folders import REPORT
from wikift.settings.fields import TrainSettings
from wikift.settings.options import ROLES, names_by_role, parse_all
from wikift.settings.run_fields import ReportSettings
from wikift.watch.record import RunRecord, read_runs, told_of_damage
from wikift.watch.report import as_html, as_text

_BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ROLES_OF_SETTINGS = {role: names_by_role(TrainSettings, role) for role in ROLES}


@told_of_damage()
def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    parsed = parse_all(ReportSettings, argv)
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
    if settings.png:
        print(f"picture: {_picture(out)}")
    return EXIT_DONE


def _check(settings: ReportSettings) -> list[RunRecord]:
    problems = [] if settings.runs else ["RUN: required; name one or several runs, runs/NAME"]
    if settings.png and _browser() is None:
        problems.append(
            f"--png: needs one of {', '.join(_BROWSERS)} (Debian: apt install chromium-headless-shell); install it, or "
            "omit --png and print the page from any browser"
        )
    return read_runs(settings.runs, problems)


def _browser() -> str | None:
    return next(filter(None, map(shutil.which, _BROWSERS)), None)


def _picture(page: Path) -> Path:
    """The page's first 1,000 x 1,400 pixels, beside it."""
    picture = page.with_suffix(".png")
    picture.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="wikift-browser-") as profile:
        done = subprocess.run(
            [
                *(str(_browser()), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
                *("--window-size=1000,1400", "--virtual-time-budget=3000", f"--user-data-dir={profile}"),
                *(f"--screenshot={picture.absolute()}", page.absolute().as_uri()),
            ],
            capture_output=True,
            timeout=120,
            check=False,
        )
    if not picture.is_file():
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise EnvironmentFault(f"{_browser()} made no picture ({''.join(last)}); {page} is complete")
    return picture
