"""A run's folder: what is left in it goes, and it may go itself. Faults at every call are in tests/faults.

pytest tests/training/test_folder.py
"""

from __future__ import annotations

import fcntl
import itertools
import os
import shutil
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.tiny import arguments, curve
from tests.training.test_resume import state, train
from wikift.base.folders import list_checkpoints
from wikift.base.world import World
from wikift.checkpoint.reader import open_sound
from wikift.training.resume import clear_leftovers


def test_what_a_killed_run_left_is_removed_and_links_are_not_followed(tmp_path: Path) -> None:
    half = tmp_path / "run" / "checkpoints" / ".step-00000003.partial"
    half.mkdir(parents=True)
    (half / "rank-00000.safetensors").write_text("half")
    (tmp_path / "file").write_text("of somebody else")
    half.with_name(".step-00000004.partial").symlink_to(tmp_path)
    for name in ("config.json.partial", "metrics.jsonl.partial"):
        (tmp_path / "run" / name).write_text("half")
    clear_leftovers(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").rglob("*")] == ["checkpoints"]
    assert (tmp_path / "file").exists()


@pytest.mark.parametrize("stacks", ["stacks", "stacks/rank-0.txt"])
def test_nothing_is_written_or_moved_through_a_planted_link(store: Path, tmp_path: Path, stacks: str) -> None:
    run, mine = tmp_path / "run", tmp_path / "mine"
    assert train(arguments(store, run, max_steps=4)) == 0
    mine.mkdir()
    (mine / "rank-0.txt").write_text("mine")
    (run / "metrics.jsonl").unlink()
    links = {".before.partial/checkpoints": mine, "metrics.jsonl": mine / "new", stacks: mine}
    links |= dict.fromkeys(["profile/trace.json.gz", *([stacks] if "/" in stacks else [])], mine / "rank-0.txt")
    for name, to in links.items():
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).symlink_to(to)
    assert train(arguments(store, run, profile=1)) == 0
    assert [(path.name, path.read_text()) for path in mine.iterdir()] == [("rank-0.txt", "mine")]


def removed_midway(what: str, command_line: list[str]) -> tuple[int, str]:
    """Train, and at the sixth step let something happen to the run's folder; the exit code and what is told."""
    from wikift.base.errors import EnvironmentFault
    from wikift.engines.single import SingleEngine

    run = Path(command_line[command_line.index("--output_dir") + 1])
    plain, steps = SingleEngine.step, itertools.count(1)

    def step(self: Any, lr: float) -> Any:
        if next(steps) == 6 and os.environ.get("RANK", "0") == "0":
            os.rename(run, run.with_name("moved"))
            if what == "deleted":
                shutil.rmtree(run.with_name("moved"))
            if what == "replaced":
                run.mkdir()
                (run / "file").touch()
        return plain(self, lr)

    SingleEngine.step = step  # type: ignore[method-assign]
    try:
        return train(command_line), ""
    except EnvironmentFault as fault:
        return 1, str(fault)


@pytest.mark.parametrize(("what", "ranks"), [("deleted", 1), ("moved", 2), ("replaced", 1)])
def test_a_folder_that_goes_away_ends_the_run_and_its_state_is_kept(
    store: Path, tmp_path: Path, what: str, ranks: int
) -> None:
    run = tmp_path / "run"
    line = arguments(store, run, save_total_limit=9)
    (code, text), *_ = run_ranks(removed_midway, ranks, what, line)
    assert code == 1
    assert f"{run} was deleted or moved while the run was writing to it" in text
    if what == "replaced":
        assert list(run.iterdir()) == [run / "file"], "it is somebody else's"
        shutil.rmtree(run)
        (tmp_path / "moved").rename(run)
    else:
        assert "its state is saved there anew, step-00000006; the same command resumes from it" in text
    assert run_ranks(train, ranks, line) == [0] * ranks
    assert run_ranks(train, ranks, arguments(store, tmp_path / "whole", save_total_limit=9)) == [0] * ranks
    kept = 0 if what == "replaced" else 6  # steps whose lines went with the folder
    assert curve(run) == curve(tmp_path / "whole")[kept:]
    expected = state(tmp_path / "whole")
    assert all(torch.equal(tensor, expected[key]) for key, tensor in state(run).items())


def test_a_closed_terminal_stops_a_run_as_sigterm_does(store: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ours, theirs = os.openpty()
    line = arguments(store, run, max_steps=3000, save_steps=3000, eval_steps=3000, quiet=False)
    command = [sys.executable, "-m", "wikift", "train", *line]

    def own_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=own_terminal)
    os.close(theirs)
    deadline, shown = time.monotonic() + 100, b""
    while b"step 3" not in shown and time.monotonic() < deadline:
        shown = (shown + os.read(ours, 65536))[-(10**6) :]
    os.close(ours)
    assert process.wait(60) == 75
    assert open_sound(list_checkpoints(run)[-1], World()).step < 3000
