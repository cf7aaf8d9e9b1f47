"""Checkpoints: complete or not there, read by ranges, and a full disk loses nothing."""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors import safe_open

from tests.ranks import run_ranks
from tests.tiny import arguments, problems_of_training, tiny_store, train
from tests.tiny_engines import make_engine, tiny_config
from wikift.base.errors import UserError
from wikift.base.files import sealed
from wikift.base.folders import list_checkpoints, step_folder
from wikift.base.world import World, start_world
from wikift.checkpoint import reader
from wikift.checkpoint.fragment import STATES
from wikift.checkpoint.reader import FORMAT, best_checkpoint, newest_sound, open_checkpoint, open_sound, prune


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three ranks: 12 steps, checkpoints at 4, 8 and 12, of which the last two and the best are kept."""
    folder = tmp_path_factory.mktemp("checkpoint")
    line = arguments(tiny_store(folder / "store"), folder / "run", global_batch_size=6)
    assert run_ranks(train, 3, line) == [0, 0, 0]
    return folder / "run"


def test_every_rank_writes_and_stock_safetensors_reads(run: Path) -> None:
    newest = list_checkpoints(run)[-1]
    manifest = json.loads((newest / "manifest.json").read_text())
    files = sorted(manifest["files"])
    assert files == [f"rank-{rank:05d}.safetensors" for rank in range(3)]
    assert sorted(p.name for p in newest.iterdir()) == ["manifest.json", *files]
    opened = open_sound(newest, World())
    seen = set()
    for file in files:
        with safe_open(newest / file, "pt") as stock:
            for key in stock.keys():  # noqa: SIM118
                name, state, start = key.split("|")
                tensor = stock.get_tensor(key)
                seen.add((name, state))
                assert torch.equal(opened.read(name, state, int(start), int(start) + len(tensor)), tensor)
    assert {(name, state) for name in opened.shapes for state in STATES} < seen
    assert opened.step == 12
    assert manifest["tokens"] == 12 * 6 * 8
    assert manifest["eval_loss"] > 0


def resume_counted(run: str, engine: str) -> tuple[int, set[str], int]:
    """The step that a rank resumes from, whose listing of the folder is old unless it is rank 0's.

    And the files that it opens until the checkpoint is known to be sound, and the bytes that its engine then reads.
    """
    world, opened, counts = start_world("cpu"), set[str](), [0]
    made, patched = make_engine(engine, world, tiny_config()), cast(Any, reader)
    read = patched.read_range

    def note(event: str, values: tuple[Any, ...]) -> None:
        if event == "open" and str(values[0]).startswith(run):
            opened.add(Path(values[0]).name)

    def read_counted(path: Path, offset: int, into: memoryview) -> None:
        counts[0] += len(into)
        read(path, offset, into)

    sys.addaudithook(note)
    patched.read_range = read_counted
    if world.rank:
        patched.list_checkpoints = lambda run: list_checkpoints(run)[:1]
    checkpoint = newest_sound(Path(run), world)
    assert checkpoint is not None
    files = set(opened)
    made.restore(checkpoint)
    return checkpoint.step, files, counts[0]


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_ranks_resume_from_the_checkpoint_that_rank_0_sees_and_read_it_once(tmp_path: Path, engine: str) -> None:
    line = arguments(tiny_store(tmp_path / "store"), tmp_path / "run", engine=engine)
    assert run_ranks(train, 4, line) == [0] * 4
    steps, files, counts = zip(*run_ranks(resume_counted, 4, str(tmp_path / "run"), engine), strict=True)
    assert steps == (12,) * 4
    own = [f"rank-{rank:05d}.safetensors" for rank in range(4)]
    assert files == ({"manifest.json", *own}, *({name} for name in own[1:])), "rank 0 reads headers, each its checksums"
    once = 4 * 3 * sum(map(math.prod, open_checkpoint(list_checkpoints(tmp_path / "run")[-1]).shapes.values()))
    ranks = 1 if engine == "ddp" else 4  # the optimizer's four numbers are read by each rank that has its own state
    assert sum(counts) == once + 4 * 4 * ranks
    assert max(counts) < once


@pytest.mark.parametrize("seed", [1, 2])
def test_after_a_flip_in_any_file_an_older_checkpoint_is_taken_and_that_is_told(
    run: Path, tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of the flips are in headers and the manifest: 46% of those in a manifest went unseen, once."""
    shutil.copytree(run, tmp_path / "run")
    newest = list_checkpoints(tmp_path / "run")[-1]
    draw, older = random.Random(seed), list_checkpoints(run)[-2].name
    for file in sorted(newest.iterdir()):
        sound = file.read_bytes()
        header = len(sound) if file.suffix == ".json" else 8 + int.from_bytes(sound[:8], "little")
        for position in [*range(8), *draw.choices(range(header), k=40), *draw.choices(range(len(sound)), k=40)]:
            content = bytearray(sound)
            content[position] ^= 1 << draw.randrange(8)
            file.write_bytes(content)
            taken = newest_sound(tmp_path / "run", World())
            assert taken is not None, (file, position)
            assert taken.path.name == older, (file, position)
            assert f"skipping a damaged checkpoint: {newest}" in capsys.readouterr().err
        file.write_bytes(sound)


def forged(folder: Path, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> None:
    """Let `change` edit a one-file checkpoint's manifest and header, with every size and digest right again."""
    manifest = json.loads((folder / "manifest.json").read_text())
    (name,) = manifest["files"]
    content = (folder / name).read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:length])
    change(manifest, header)
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + content[length:]
    (folder / name).write_bytes(content)
    for facts in manifest.get("files", {}).values():
        facts.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    (folder / "manifest.json").write_text(json.dumps(sealed(manifest)))


BIAS = "transformer.ln_f.bias"
FORGERIES: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], object], str]] = {
    "overlap": (lambda _, h: h.update({f"{BIAS}|weight|31": h.pop(f"{BIAS}|weight|0")}), "gap or an overlap"),
    "twice": (lambda _, h: h.update({f"{BIAS}|weight|00": h[f"{BIAS}|weight|0"]}), "overlap"),
    "missing": (lambda m, _: m["parameters"].update({BIAS: [33]}), "has 32 elements of 33"),
    "unknown": (lambda m, _: m["parameters"].pop(BIAS), "unknown"),
    "out of range": (lambda m, _: m["parameters"].update({BIAS: [31]}), "has 32 elements of 31"),
    "type": (lambda _, h: h[f"{BIAS}|weight|0"].update(dtype="I32"), "is I32"),
    "shape": (lambda _, h: h[f"{BIAS}|weight|0"].update(shape=[4, 8]), r"is F32 \[4, 8\]"),
    "before the data": (lambda _, h: h[f"{BIAS}|weight|0"].update(data_offsets=[-128, 0]), "at -128"),
    "no count": (lambda _, h: h.pop("optimizer|updates|0"), "gaps"),
    "another folder": (lambda m, _: m["files"].update({"../x.safetensors": {}}), "another folder"),
    "another step": (lambda m, _: m.update(step=8), "is the checkpoint of step 8"),
    "no files": (lambda m, _: m.pop("files"), "damaged"),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one rank, step 4."""
    folder = tmp_path_factory.mktemp("alone")
    assert run_ranks(train, 1, arguments(tiny_store(folder / "store"), folder / "run", max_steps=4)) == [0]
    return list_checkpoints(folder / "run")[-1]


@pytest.mark.parametrize("kind", FORGERIES)
def test_ranges_that_are_not_the_parameters_once_each_are_refused(alone: Path, tmp_path: Path, kind: str) -> None:
    copy = shutil.copytree(alone, tmp_path / alone.name)
    forged(copy, lambda manifest, header: None)
    assert open_sound(copy, World()).step == 4
    change, problem = FORGERIES[kind]
    forged(copy, change)
    with pytest.raises(UserError, match=problem):
        open_checkpoint(copy)


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    line = arguments(tiny_store(tmp_path / "store"), tmp_path / "run", save_steps=1, max_steps=6, save_total_limit=2)
    assert run_ranks(train, 1, line) == [0]
    lines = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    best = min(lines, key=lambda values: values["eval_loss"])["step"]
    kept = [open_checkpoint(path).step for path in list_checkpoints(tmp_path / "run")]
    assert kept == sorted({best, 5, 6})
    assert best_checkpoint(tmp_path / "run") == step_folder(tmp_path / "run", best)


def test_an_older_best_outlives_newer_ones(tmp_path: Path) -> None:
    for step, loss in ((4, 1.0), (8, 3.0), (12, 2.0), (16, 2.5)):
        folder = step_folder(tmp_path, step)
        folder.mkdir(parents=True)
        content = {"format": FORMAT, "step": step, "eval_loss": loss}
        (folder / "manifest.json").write_text(json.dumps(sealed(content)))
    shutil.copytree(step_folder(tmp_path, 12), step_folder(tmp_path, 12).with_suffix(".bak"))
    moved = step_folder(tmp_path, 6)  # to another disk, say
    shutil.copytree(step_folder(tmp_path, 12), tmp_path / "elsewhere")
    moved.symlink_to(tmp_path / "elsewhere")
    unknown = step_folder(tmp_path, 2) / "manifest.json"
    unknown.mkdir(parents=True)  # cannot be read: it may be the best
    prune(tmp_path, keep=1)
    assert len(list_checkpoints(tmp_path)) == 6, "none is deleted"
    shutil.rmtree(unknown)
    (step_folder(tmp_path, 8) / "manifest.json").write_text('{"eval_loss": 0.5')  # says nothing that counts
    prune(tmp_path, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000004", moved.name, "step-00000016"]
    assert (tmp_path / "checkpoints" / "step-00000012.bak").is_dir()
    assert (moved / "manifest.json").is_file()


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no manifest\.json"):
        open_checkpoint(tmp_path)
    for content, problem in (
        ('{"format": "wikift-checkpoint-1"}', "this version .* reads wikift-checkpoint-2; .*version that wrote it"),
        ("{", "cannot be read"),
        ("[" * 10**5, "cannot be read"),
        ('"text"', "cannot be read"),
    ):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(UserError, match=problem):
            open_checkpoint(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system with room for little more than one checkpoint of the tiny model."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", folder]).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_keeps_the_last_good_checkpoint(
    small_disk: Path, tmp_path: Path, ranks: int, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tiny_store(tmp_path / "store")
    run = small_disk / "run"
    faults = run_ranks(problems_of_training, ranks, arguments(store, run, save_total_limit=9))
    assert all("step-00000004" in fault and "Free disk space" in fault for _, fault in faults), faults
    assert "No space left on device" in capsys.readouterr().out
    (kept,) = list_checkpoints(run)
    assert open_sound(kept, World()).step == 4
    assert [p.name for p in kept.parent.iterdir()] == ["step-00000004"], "nothing half there"
    # room is made: the same command resumes
    subprocess.run(["mount", "-o", "remount,size=9m", str(small_disk)], check=True)
    assert run_ranks(train, ranks, arguments(store, run, save_total_limit=9)) == [0] * ranks
    assert [p.name for p in list_checkpoints(run)] == ["step-00000004", "step-00000008", "step-00000012"]
