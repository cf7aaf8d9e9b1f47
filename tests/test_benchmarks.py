"""What `make bench` says of two results, and the page that is made of stored ones: pytest tests/test_benchmarks.py"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench, harness, report
from benchmarks.compare import in_both

MACHINE = {"cpu": "a processor", "cpu_family_model": "1/2", "cores": 2, "torch": "2.13.0"}


def stored(folder: Path, ours: list[float], theirs: list[float], *, figure: str = "tokens/s", **machine: Any) -> Path:
    """A train.json and .md as a benchmark writes them."""
    figures: harness.Figures = {"Trainer": {figure: theirs} if theirs else {}, "wikift": {figure: ours}}
    harness.write(
        "train", "Training steps", harness.table(figures, against="Trainer", figure=figure) if theirs else [], figures,
        settings={"block": 8}, about=MACHINE | machine, folder=folder, against=dict.fromkeys(figures, "Trainer"),
    )  # fmt: skip
    return folder


@pytest.mark.parametrize(
    ("figure", "before", "after", "named"),
    [
        ("tokens/s", [200.0, 204, 198], [150.0, 152, 151], True),
        ("tokens/s", [200.0, 204, 198], [250.0, 252, 251], False),  # better
        ("tokens/s", [200.0, 201, 200], [195.0, 195, 196], False),  # less than two runs differ by anyway
        ("tokens/s", [200.0, 240, 160], [150.0, 152, 151], False),  # the rounds before say nothing as sharp
        ("stall s", [2.0, 2.04, 1.98], [2.5, 2.52, 2.51], True),  # lower is better
        ("stall s", [2.0, 2.04, 1.98], [1.5, 1.52, 1.51], False),
    ],
)
def test_a_drop_beyond_the_noise_is_named(
    tmp_path: Path, figure: str, before: list[float], after: list[float], named: bool
) -> None:
    old = stored(tmp_path / "1", before, [100.0, 100, 100], figure=figure)
    new = stored(tmp_path / "2", after, [100.0, 100, 100], figure=figure)
    found = bench.said(new, [old])
    assert [f"wikift, {figure}, times Trainer" in drop.text for drop in found] == [True] * named


@pytest.mark.parametrize(("after", "named"), [([170.0, 171], False), ([150.0, 151], True)])
def test_a_figure_without_another_beside_it_must_fall_by_more(tmp_path: Path, after: list[float], named: bool) -> None:
    old = stored(tmp_path / "1", [200.0, 201], [])
    assert bool(bench.said(stored(tmp_path / "2", after, []), [old])) == named


def test_a_drop_counts_where_a_second_run_shows_it(tmp_path: Path) -> None:
    old = stored(tmp_path / "1", [200.0, 201], [])
    first, second = (bench.said(stored(tmp_path / name, [150.0, 151], []), [old]) for name in ("2", "3"))
    assert in_both(first, second) == second != []
    assert in_both(first, bench.said(stored(tmp_path / "4", [200.0, 201], []), [old])) == []
    assert in_both([], second) == []


def test_a_slower_machine_is_no_drop_and_another_machine_is_not_compared(tmp_path: Path) -> None:
    older = stored(tmp_path / "0", [100.0, 102, 99], [100.0, 101, 99])
    old = stored(tmp_path / "1", [200.0, 204, 198], [100.0, 101, 99])
    slower = stored(tmp_path / "2", [100.0, 102, 99], [50.0, 51, 49])
    assert bench.said(slower, [old]) == []
    other = stored(tmp_path / "3", [100.0, 102, 99], [100.0, 101, 99], cpu="another")
    assert bench.said(other, [old, slower]) == []
    same = stored(tmp_path / "4", [100.0, 102, 99], [100.0, 101, 99])
    assert len(bench.said(same, [older, old, other])) == 1  # the newest of the same machine, not the newest


def test_the_page_says_what_was_reached_and_keeps_what_was_written_by_hand(tmp_path: Path) -> None:
    results = stored(tmp_path, [190.0, 210, 230], [100.0, 100, 100])
    page = report.page(results, "")
    assert "| ≥ 2 | 2.1 | yes | wikift / Trainer | train |" in page
    assert "times the best compiled peer | ≥ 1.3 | | not measured |" in page
    assert "| wikift | 210 | 2.1 (1.9 to 2.3) |" in page
    assert "- A: cpu a processor" in page
    written = page.replace(
        f"<!-- by hand: train -->\n{report.NOT_YET}", "<!-- by hand: train -->\nThe head takes 60%.\n"
    )
    assert written != page
    assert report.page(stored(tmp_path, [150.0], [100.0]), written).count("The head takes 60%.") == 1
    for file in results.glob("train.*"):
        file.unlink()
    assert "The head takes 60%." in report.page(results, written)  # its table is gone, the text is not


def test_the_stored_results_make_a_page() -> None:
    stored = [path for path in harness.RESULTS.glob("*.json") if path.stem in report.PAGES]
    assert stored
    page = report.page(harness.RESULTS, "")
    assert all(f"<!-- by hand: {path.stem} -->" in page for path in stored)
    others = [path.stem for path in harness.RESULTS.glob("*.json") if path not in stored]
    assert others
    assert all(f"| `{name}.md` |" in page for name in others)
