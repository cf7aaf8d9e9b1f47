"""Saving while training goes on: it waits for a copy, nothing else; a kill or a full disk loses nothing older.

pytest tests/checkpoint/test_writer.py
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.ranks import each, run_ranks
from tests.tiny import arguments, metrics, tiny_store
from tests.tiny_engines import ENGINES, make_engine, random_start, tiny_config
from wikift.base.errors import EnvironmentFault
from wikift.base.folders import list_checkpoints
from wikift.base.world import World
from wikift.checkpoint import writer
from wikift.checkpoint.fragment import OPTIMIZER, SCALARS, STATES, Fragment
from wikift.checkpoint.reader import open_checkpoint, open_sound
from wikift.checkpoint.writer import Saver
from wikift.commands.train import main as train

PARAMETERS = {"weight": [6]}


def fragments(live: torch.Tensor) -> Iterator[Fragment]:
    for state in STATES:
        yield Fragment("weight", state, 0, (6,), live)
    for number in SCALARS:
        yield Fragment(OPTIMIZER, number, 0, (1,), live[:1])


@pytest.fixture
def held_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The disk, so slow that nothing is written until the event is set."""
    go, write = threading.Event(), writer._write_rank

    def wait_and_write(tensors: dict[str, torch.Tensor], folder: Path, rank: int) -> None:
        assert go.wait(60)
        write(tensors, folder, rank)

    monkeypatch.setattr(writer, "_write_rank", wait_and_write)
    yield go
    go.set()


def test_what_is_written_is_the_state_when_save_was_called(tmp_path: Path, held_up: threading.Event) -> None:
    live = torch.arange(6.0)
    saver = Saver(tmp_path, World(), keep=9, aside=True)
    saver.save(fragments(live), 1, {}, PARAMETERS)
    live += 100  # the next step
    assert list_checkpoints(tmp_path) == [], "save came back before anything was written"
    held_up.set()
    saver.finish()
    (path,) = list_checkpoints(tmp_path)
    assert open_sound(path, World()).read("weight", "exp_avg", 0, 6).tolist() == [0, 1, 2, 3, 4, 5]
    saved = saver.take_saved()
    assert saved is not None
    assert saved.path == path
    assert saved.stall_seconds <= saved.seconds
    assert saver.take_saved() is None


def test_at_most_one_save_is_in_flight(tmp_path: Path, held_up: threading.Event) -> None:
    saver = Saver(tmp_path, World(), keep=9, aside=True)
    saver.save(fragments(torch.zeros(6)), 1, {}, PARAMETERS)
    second = threading.Thread(target=lambda: saver.save(fragments(torch.ones(6)), 2, {}, PARAMETERS))
    second.start()
    second.join(0.5)
    assert second.is_alive(), "the second save waits for the first"
    held_up.set()
    second.join(60)
    saver.finish()
    assert [open_checkpoint(path).step for path in list_checkpoints(tmp_path)] == [1, 2]


def test_a_fault_is_raised_later_and_older_checkpoints_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saver = Saver(tmp_path, World(), keep=9, aside=True)
    saver.save(fragments(torch.zeros(6)), 1, {}, PARAMETERS)
    saver.finish()

    def no_room(*_: object) -> None:
        raise OSError(28, os.strerror(28), "rank-00000.safetensors")

    monkeypatch.setattr(writer, "_write_rank", no_room)
    saver.save(fragments(torch.ones(6)), 2, {}, PARAMETERS)  # says nothing yet
    with pytest.raises(EnvironmentFault, match="step-00000001"):
        saver.finish()
    assert "No space left on device" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def late_fault(store: str, run: str) -> tuple[str, list[int]]:
    """A run whose second rank cannot write step 4: what is raised, and the steps that were logged until then."""
    write = writer._write_rank

    def fail_on_rank_1(tensors: dict[str, torch.Tensor], folder: Path, rank: int) -> None:
        if rank == 1 and "00000004" in folder.name:
            raise OSError(28, os.strerror(28), str(folder))
        write(tensors, folder, rank)

    writer._write_rank = fail_on_rank_1
    try:
        train(arguments(Path(store), Path(run), save_steps=2, max_steps=200))
    except EnvironmentFault as fault:
        return str(fault), [values["step"] for values in metrics(Path(run))]
    return "", []


def test_a_rank_that_cannot_write_ends_all_at_the_next_step(tmp_path: Path) -> None:
    store = tiny_store(tmp_path / "store")
    for fault, steps in run_ranks(late_fault, 2, str(store), str(tmp_path / "run")):
        assert "the checkpoint of step 4 was not written" in fault
        assert "step-00000002" in fault, "the newest complete one is named"
        assert steps[-1] <= 6, "not after the save that would have been next"


def test_stall_and_time_are_logged(tmp_path: Path) -> None:
    run = tmp_path / "run"
    line = arguments(tiny_store(tmp_path / "store"), run, save_total_limit=9, eval_steps=100)
    assert run_ranks(train, 1, line) == [0]
    rows = [values for values in metrics(run) if "saved_step" in values]
    assert [values["saved_step"] for values in rows] == [4, 8]
    for values in rows:
        assert values["step"] > values["saved_step"]
        manifest = open_checkpoint(run / "checkpoints" / f"step-{values['saved_step']:08d}").manifest
        assert 0 < manifest["save_stall_seconds"] <= manifest["save_seconds"]
        assert values["save_seconds"] == pytest.approx(manifest["save_seconds"], abs=1e-3)


def restore_and_count(kind: str, path: str, width: int) -> tuple[int, int]:
    """On one rank: (bytes asked of the kernel while restoring, bytes of this rank's state)."""
    from wikift.base.world import start_world

    engine = make_engine(kind, start_world("cpu"), tiny_config(n_embd=width))
    checkpoint = open_checkpoint(Path(path))
    before = bytes_read()
    engine.restore(checkpoint)
    read = bytes_read() - before
    return read, sum(4 * fragment.data.numel() for fragment in engine.fragments())


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def write_checkpoint(run: str, width: int) -> None:
    config = tiny_config(n_embd=width)
    engine = make_engine("single", World(), config)
    engine.restore(random_start(config))
    shapes = {name: list(p.shape) for name, p in engine.model.named_parameters()}
    Saver(Path(run), World(), keep=1, aside=False).save(engine.fragments(), 1, {}, shapes)


def test_restoring_reads_only_what_a_rank_keeps(tmp_path: Path) -> None:
    """Three ranks, which divide no tensor evenly; 8 MB of state."""
    run_ranks(write_checkpoint, 1, str(tmp_path), 256)
    (path,) = list_checkpoints(tmp_path)
    cases = [(kind, str(path), 256) for kind in ENGINES[2:]]
    for counted in zip(*run_ranks(each, 3, restore_and_count, cases), strict=True):
        for read, owned in counted:
            assert owned <= read < owned + 200_000, "its own bytes, and some words of gloo's and DeepSpeed's"
        assert sum(owned for _, owned in counted) > 10e6


def train_in_bf16(kind: str, run: str) -> None:
    """Two steps, then a checkpoint."""
    from wikift.base.world import start_world

    world, config = start_world("cpu"), tiny_config()
    engine = make_engine(kind, world, config, precision="bf16")
    engine.restore(random_start(config))
    for step in range(2):
        engine.forward_backward(torch.full((1, 9), 3 * world.rank + step), last=True)
        engine.step(1e-3)
    shapes = {name: list(shape) for name, shape in shapes_of(engine).items()}
    Saver(Path(run), world, keep=1, aside=False).save(engine.fragments(), 1, {}, shapes)


def shapes_of(engine: object) -> dict[str, tuple[int, ...]]:
    from wikift.model.gpt2 import parameter_shapes

    model = engine.local.model if hasattr(engine, "local") and hasattr(engine, "ddp") else engine.model  # type: ignore[attr-defined]
    return parameter_shapes(model)


def same_after_restore(kind: str, path: str) -> bool:
    """Whether an engine in bf16 holds the checkpoint's fp32 numbers, not a bit rounded."""
    from wikift.base.world import start_world

    engine = make_engine(kind, start_world("cpu"), tiny_config(), precision="bf16")
    checkpoint = open_checkpoint(Path(path))
    engine.restore(checkpoint)
    return all(
        torch.equal(f.data.cpu(), checkpoint.read(f.name, f.state, f.start, f.start + f.data.numel()))
        for f in engine.fragments()
    )


def test_bf16_keeps_fp32_masters_and_moments_through_a_change_of_engine(tmp_path: Path) -> None:
    run_ranks(each, 2, train_in_bf16, [(kind, str(tmp_path / kind)) for kind in ENGINES[1:]])
    paths = {kind: list_checkpoints(tmp_path / kind)[0] for kind in ENGINES[1:]}
    for path in paths.values():
        opened = open_sound(path, World())
        for state in STATES:
            values = opened.read("transformer.wte.weight", state, 0, 97 * 32)
            assert not torch.equal(values, values.bfloat16().float()), f"{state} has more than bf16's bits"
    changes = [("zero2", "fsdp"), ("fsdp", "ddp"), ("ddp", "zero3"), ("zero3", "zero1"), ("zero1", "zero2")]
    cases = [(after, str(paths[before])) for before, after in changes]
    assert run_ranks(each, 3, same_after_restore, cases) == [[True] * len(changes)] * 3
