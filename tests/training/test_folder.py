"""A run's folder through kills and power cuts: old or new, never half, and the next start leaves no trace of them.

pytest tests/training/test_folder.py
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import shutil
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import _CONTEXT, run_ranks
from tests.tiny import arguments, curve
from tests.training.test_resume import state, train
from wikift.base.folders import list_checkpoints
from wikift.base.publish import publish_folder
from wikift.base.world import World
from wikift.checkpoint.reader import open_sound, prune
from wikift.training.resume import clear_leftovers, set_aside


@pytest.fixture(scope="module")
def whole(store: Path) -> Path:
    """A finished run: checkpoints at 4, 8 and 12."""
    run = store.parent / "whole"
    assert run_ranks(train, 1, arguments(store, run, save_total_limit=9)) == [0]
    return run


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def killed_at(number: int, work: Callable[[], Any]) -> bool:
    """Do `work` in a child that dies before its call number `number` that changes names on the disk; whether it did."""
    child = os.fork()
    if child == 0:
        calls = itertools.count(1)

        def die(event: str, _: Any) -> None:
            if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir") and next(calls) == number:
                os._exit(9)

        sys.addaudithook(die)
        with contextlib.suppress(BaseException):
            work()
            os._exit(0)
        os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


def test_a_kill_while_a_run_is_moved_aside_loses_nothing_of_it(whole: Path, tmp_path: Path) -> None:
    before, run = snapshot(whole), tmp_path / "run"
    start = open_sound(list_checkpoints(whole)[0], World())
    for begin in (None, start):
        for number in itertools.count(1):
            shutil.copytree(whole, run)
            killed = killed_at(number, partial(set_aside, run, begin))
            clear_leftovers(run)
            aside = snapshot(run / "before-1")
            if not aside:
                assert snapshot(run) == before, number
                set_aside(run, begin)
                aside = snapshot(run / "before-1")
            assert not list(run.glob(".*"))
            if begin is None:
                assert aside == before
            assert {path.name for path in list_checkpoints(run / "before-1")} >= {"step-00000008", "step-00000012"}
            shutil.rmtree(run)
            if not killed:
                break
        assert number > 4


def test_a_kill_while_checkpoints_are_deleted_leaves_whole_ones_and_no_rest(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for number in itertools.count(1):
        shutil.copytree(whole, run)
        killed = killed_at(number, partial(prune, run, 1))
        clear_leftovers(run)
        kept = list_checkpoints(run)
        assert [open_sound(path, World()).step for path in kept][-1] == 12
        assert sorted((run / "checkpoints").iterdir()) == kept
        shutil.rmtree(run)
        if not killed:
            break
    assert number > 4


def killed_while_the_tokenizer_is_copied(command_line: list[str]) -> None:
    shutil.copyfile = lambda *_: os._exit(9)
    train(command_line)


def test_a_killed_start_leaves_no_torn_model_and_the_next_start_no_rest(store: Path, whole: Path) -> None:
    run = store.parent / "killed"
    line = arguments(store, run, save_total_limit=9)
    child = _CONTEXT.Process(target=killed_while_the_tokenizer_is_copied, args=(line,))
    child.start()
    child.join(60)
    assert child.exitcode == 9
    assert (run / "config.json").is_file()
    assert not (run / "model").exists()
    half = run / "checkpoints" / ".step-00000003.partial"
    half.mkdir(parents=True)
    (half / "rank-00000.safetensors").write_text("half")
    other = store.parent / "of-somebody-else"
    other.mkdir()
    (other / "file").write_text("")
    half.with_name(".step-00000004.partial").symlink_to(other)
    for name in ("config.json.partial", "metrics.jsonl.partial"):
        (run / name).write_text("half")
    assert run_ranks(train, 1, line) == [0]
    assert snapshot(run / "model") == snapshot(whole / "model")
    assert curve(run) == curve(whole)
    assert not [path for path in run.rglob("*") if "partial" in path.name or "old" in path.name]
    assert (other / "file").exists()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What happens on the disk, in order: what is synced, renamed and removed."""
    events: list[tuple[str, str]] = []
    patch_disk(events, monkeypatch.setattr)
    return events


def patch_disk(events: list[tuple[str, str]], patch: Callable[[Any, str, Any], None]) -> None:
    fsync, rename, rmtree = os.fsync, os.rename, shutil.rmtree

    def synced(descriptor: int) -> None:
        events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        events.append(("rename", str(source)))
        rename(source, target)

    def removed(path: Path, **_: Any) -> None:
        events.append(("remove", str(path)))
        rmtree(path)

    patch(os, "fsync", synced)
    patch(os, "rename", renamed)
    patch(shutil, "rmtree", removed)


def traced(command_line: list[str]) -> list[tuple[str, str]]:
    events: list[tuple[str, str]] = []
    patch_disk(events, setattr)
    assert train(command_line) == 0
    return events


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name_and_older_ones_go(store: Path, tmp_path: Path) -> None:
    """With the lines of metrics.jsonl until its step."""
    run = tmp_path / "run"
    line = arguments(store, run, save_total_limit=1, eval_steps=None, save_steps=6, max_steps=12)
    (events,) = run_ranks(traced, 1, line)
    folder = run / "checkpoints"
    for step in (6, 12):
        aside = str(folder / f".step-{step:08d}.partial")
        published = events.index(("rename", aside))
        synced = [path for event, path in events[:published] if event == "sync"]
        assert synced[-1] == aside, "its names, after all of its files"
        assert {f"{aside}/rank-00000.safetensors", f"{aside}/manifest.json.partial"} <= set(synced)
        assert synced.count(str(run / "metrics.jsonl")) == step // 6
        assert events[published + 1] == ("sync", str(folder))


def test_a_folder_is_on_the_disk_before_the_earlier_one_is_moved_away(
    tmp_path: Path, disk: list[tuple[str, str]]
) -> None:
    for text in ("old", "new"):
        disk.clear()
        with publish_folder(tmp_path / "out", replace=True) as aside:
            (aside / "inner").mkdir()
            (aside / "inner" / "file").write_text(text)
    first = next(index for index, (event, _) in enumerate(disk) if event == "rename")
    assert {path for _, path in disk[:first]} == {str(aside), f"{aside}/inner", f"{aside}/inner/file"}
    removed = next(index for index, (event, _) in enumerate(disk) if event == "remove")
    assert ("sync", str(tmp_path)) in disk[first:removed]


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
