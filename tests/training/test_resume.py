"""A run that was stopped, killed or damaged goes on as if nothing had happened, to the last bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import each, run_ranks
from tests.tiny import arguments, curve, metrics, problems_of_training, tiny_store, train
from wikift.base.folders import list_checkpoints, step_folder
from wikift.base.world import World
from wikift.checkpoint.fragment import STATES
from wikift.checkpoint.reader import open_checkpoint, open_sound
from wikift.training.resume import set_aside


@pytest.fixture(scope="module")
def on_two(store: Path) -> Path:
    """A run of two ranks with all its checkpoints: steps 4, 8 and 12."""
    run = store.parent / "on-two"
    assert run_ranks(train, 2, arguments(store, run, save_total_limit=9)) == [0, 0]
    return run


def state(run: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Every weight and moment of the newest checkpoint."""
    found = open_sound(list_checkpoints(run)[-1], World())
    return {
        (name, kind): found.read(name, kind, 0, torch.Size(shape).numel())
        for name, shape in found.shapes.items()
        for kind in STATES
    }


def assert_same_run(run: Path, reference: Path) -> None:
    assert curve(run) == curve(reference)
    expected = state(reference)
    for key, tensor in state(run).items():
        assert torch.equal(tensor, expected[key]), key


def forget_after(run: Path, step: int) -> None:
    for path in list_checkpoints(run):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)


@pytest.mark.parametrize(("ranks", "every"), [(1, 1), (2, 1), (3, 4)])
def test_resume_from_every_step_is_bit_for_bit(store: Path, tmp_path: Path, ranks: int, every: int) -> None:
    """12 steps over two epochs (51 blocks, 6 or 12 a step), dropout on. Three ranks: DDP's bucket order matters."""
    batch = 8 if ranks < 3 else 6
    words = {"global_batch_size": batch, "save_steps": 1, "save_total_limit": 12, "gradient_accumulation_steps": 2}
    whole = tmp_path / "whole"
    if ranks == 2:
        words["per_device_train_batch_size"] = 2
    assert run_ranks(train, ranks, arguments(store, whole, **words)) == [0] * ranks
    assert len(list_checkpoints(whole)) == 12
    runs = [tmp_path / f"from{step}" for step in range(1, 12, every)]
    for step, run in zip(range(1, 12, every), runs, strict=True):
        shutil.copytree(whole, run)
        forget_after(run, step)
    lines = [(arguments(store, run, **words),) for run in runs]
    assert run_ranks(each, ranks, train, lines) == [[0] * len(runs)] * ranks
    for run in runs:
        assert_same_run(run, whole)


def stopped_by(number: int, command_line: list[str]) -> int:
    """Train in this process and send it a signal after the third step is logged."""
    import threading

    run = Path(command_line[command_line.index("--output_dir") + 1])

    def watch() -> None:
        while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < 3:
            time.sleep(0.005)
        os.kill(os.getpid(), number)

    threading.Thread(target=watch, daemon=True).start()
    return train(command_line)


def test_a_signal_saves_and_the_same_command_goes_on(store: Path, tmp_path: Path) -> None:
    words = {"max_steps": 300, "save_steps": 300, "eval_steps": 300}
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    lines = [arguments(store, tmp_path / str(number), **words) for number in numbers]
    for number, line in zip(numbers, lines, strict=True):
        assert run_ranks(stopped_by, 1, number, line) == [75]
        (saved,) = list_checkpoints(tmp_path / str(number))
        assert 3 <= open_checkpoint(saved).step < 300
    cases = [(line,) for line in [*lines, arguments(store, tmp_path / "whole", **words)]]
    assert run_ranks(each, 1, train, cases) == [[0] * 5]
    for number in numbers:
        assert_same_run(tmp_path / str(number), tmp_path / "whole")


def stopped_in(number: int, kind: str, command_line: list[str]) -> int:
    """Train, and ask the last rank to stop in its micro-batch `number`."""
    from wikift.engines.fsdp import FSDPEngine
    from wikift.engines.single import SingleEngine
    from wikift.engines.zero import ZeroEngine

    engine = FSDPEngine if kind.startswith("fsdp") else ZeroEngine if kind.startswith("zero") else SingleEngine
    plain = engine.forward_backward
    calls = -2 if kind == "ddp" else 0  # DDP settles its buckets in two
    last_rank = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)

    def forward_backward(self: Any, blocks: torch.Tensor, *, last: bool) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == number and last_rank:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(self, blocks, last=last)

    engine.forward_backward = forward_backward  # type: ignore[method-assign, assignment]
    return train(command_line)


@pytest.mark.parametrize("kind", ["single", "ddp", "fsdp", "fsdp whole", "zero2"])
def test_a_stop_between_micro_batches_discards_the_step(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    store, ranks = tiny_store(tmp_path / "store"), 1 if kind == "single" else 2
    words: dict[str, Any] = {"max_steps": 9, "save_steps": 9, "eval_steps": 3, "gradient_accumulation_steps": 4,
                             "no_fsdp_reshard": kind == "fsdp whole", "quiet": False}  # fmt: skip
    words |= {"deepspeed": kind} if kind.startswith("zero") else {"engine": kind.split()[0]}
    run = tmp_path / "run"
    assert run_ranks(stopped_in, ranks, 6 * 4 + 2, kind, arguments(store, run, **words)) == [75] * ranks
    printed = capfd.readouterr().out
    assert "step 7 is discarded: 2 of its 4 micro-batches were computed" in printed
    assert "stopped by SIGINT and saved" in printed
    (saved,) = list_checkpoints(run)
    assert open_checkpoint(saved).step == 6
    assert open_checkpoint(saved).manifest["eval_loss"] == metrics(run)[5]["eval_loss"]
    assert run_ranks(train, ranks, arguments(store, run, **words)) == [0] * ranks
    assert run_ranks(train, ranks, arguments(store, tmp_path / "whole", **words)) == [0] * ranks
    assert_same_run(run, tmp_path / "whole")


def test_ranks_stop_after_the_same_step_the_one_after_the_signal(store: Path, tmp_path: Path) -> None:
    """Whether to stop is asked as a step begins and answered at its end: none waits for the host of another."""
    words: dict[str, Any] = {"max_steps": 9, "save_steps": 9, "eval_steps": 9, "logging_steps": 9, "engine": "ddp"}
    run = tmp_path / "run"
    assert run_ranks(stopped_in, 2, 6, "ddp", arguments(store, run, **words)) == [75, 75]
    (saved,) = list_checkpoints(run)
    assert open_checkpoint(saved).step == 7
    assert run_ranks(train, 2, arguments(store, run, **words)) == [0, 0]
    assert run_ranks(train, 2, arguments(store, tmp_path / "whole", **words)) == [0, 0]
    assert_same_run(run, tmp_path / "whole")


def test_a_damaged_newest_checkpoint_is_passed_over(
    store: Path, on_two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bit anywhere: tests/checkpoint/test_reader.py."""
    run = tmp_path / "run"
    shutil.copytree(on_two, run)
    forget_after(run, 8)
    file = step_folder(run, 8) / "rank-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with open(run / "metrics.jsonl", "a") as torn:
        torn.write('{"step": 13, "lo')
    capsys.readouterr()
    assert run_ranks(train, 2, arguments(store, run)) == [0, 0]
    assert "skipping a damaged checkpoint" in capsys.readouterr().out
    assert_same_run(run, on_two)


def test_no_sound_checkpoint_is_an_error_with_a_way_out(store: Path, tmp_path: Path) -> None:
    line = arguments(store, tmp_path / "run", max_steps=4)
    assert run_ranks(train, 1, line) == [0]
    file = step_folder(tmp_path / "run", 4) / "rank-00000.safetensors"
    file.write_bytes(b"")
    ((problem,),) = run_ranks(problems_of_training, 1, line)
    assert "--resume never" in problem
    assert run_ranks(train, 1, [*line, "--resume", "never"]) == [0]
    assert (tmp_path / "run" / "before-1" / "checkpoints" / "step-00000004").is_dir()


def test_what_would_break_the_run_is_refused_and_the_rest_is_said(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, run = tiny_store(tmp_path / "other", seed=1), tmp_path / "run"
    assert run_ranks(train, 1, arguments(store, run, max_steps=4)) == [0]
    before = sorted(run.rglob("*"))
    wrong = {"seed": 7, "global_batch_size": 4, "block_size": 4, "data_fraction": 0.5, "dropout": 0.0}
    (problems,) = run_ranks(problems_of_training, 1, arguments(store, run, max_steps=8, **wrong))
    for name in wrong:
        assert any(p.startswith("--" + name.replace("_", "-")) and "--resume never" in p for p in problems), name
    ((problem,),) = run_ranks(problems_of_training, 1, arguments(other, run, max_steps=8))
    assert problem.startswith(f"--data {other}")
    assert sorted(run.rglob("*")) == before
    capsys.readouterr()
    assert run_ranks(train, 1, arguments(store, run, max_steps=8, weight_decay=0.5, quiet=False)) == [0]
    said = capsys.readouterr().out
    assert "--weight-decay 0.0 -> 0.5" in said
    assert "--max-steps 4 -> 8" in said
    assert [values["step"] for values in metrics(run)] == list(range(1, 9))


def test_a_finished_run_says_so_and_resume_never_keeps_the_old_one(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = arguments(store, tmp_path / "run", quiet=False)
    assert run_ranks(train, 1, line) == [0]
    first = curve(tmp_path / "run")
    capsys.readouterr()
    assert run_ranks(train, 1, line) == [0]
    assert "is finished" in capsys.readouterr().out
    for changed in ({"learning_rate": 1e-3}, {"max_steps": 8}, {"eval_steps": 2, "early_stopping_patience": 3}):
        (problems,) = run_ranks(problems_of_training, 1, arguments(store, tmp_path / "run", **changed))
        assert len(problems) == len(changed)
        assert all("--output-dir, or --resume never" in problem for problem in problems)
    assert curve(tmp_path / "run") == first, "nothing was trained"
    # the same length in other words, another batch layout and what only shows the run are no other schedule
    same = {"max_steps": None, "num_train_epochs": 12 * 8 / 51, "per_device_train_batch_size": 4, "logging_steps": 3}
    assert run_ranks(train, 1, arguments(store, tmp_path / "run", **same)) == [0]
    assert run_ranks(train, 1, [*line, "--resume", "never"]) == [0]
    assert curve(tmp_path / "run") == first
    assert curve(tmp_path / "run" / "before-1") == first


def test_a_dry_run_says_where_the_run_would_start_and_refuses_what_it_would(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    line = arguments(store, run, max_steps=8, save_steps=4)

    def start(**words: Any) -> list[str]:
        capsys.readouterr()
        assert train(arguments(store, run, **{"max_steps": 8, "save_steps": 4, "dry_run": True, **words})) == 0
        return [text for text in capsys.readouterr().out.splitlines() if "starts" in text or "changed" in text]

    assert start() == ["# starts: at step 1"]
    assert run_ranks(train, 1, line) == [0]
    before = sorted(run.rglob("*"))
    assert start() == ["# starts: finished, step 8; a longer --max-steps or --num-train-epochs resumes it"]
    (started, changed) = start(max_steps=12, weight_decay=0.5)
    assert started == f"# starts: after step 8 of {step_folder(run, 8)}, if that is valid"
    assert "--weight-decay 0.0 -> 0.5" in changed
    assert start(resume="never") == ["# starts: at step 1; what is in the output folder is moved aside"]
    assert start(resume=step_folder(run, 4))[0].startswith("# starts: after step 4 of ")
    (problem,) = problems_of_training([*line, "--weight-decay", "0.5", "--dry-run"])
    assert problem.startswith(f"--weight-decay 0.5: trains nothing, {run} is finished with 0.0; use the old value")
    (problem,) = problems_of_training([*line, "--seed", "7", "--dry-run"])
    assert problem.startswith("--seed 7: this run was started with 42")
    (problem,) = problems_of_training([*line, "--resume", str(run), "--dry-run"])
    assert problem.startswith(f"--resume {run}: must be")
    file = step_folder(run, 8) / "rank-00000.safetensors"
    file.write_bytes(b"")
    assert start()[0].startswith("# starts: after step 4 of ")  # as the run would
    assert sorted(run.rglob("*")) == before


def test_resume_from_a_named_checkpoint_sets_the_later_ones_aside(store: Path, on_two: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(on_two, run)
    (run / "wandb-id.txt").write_text("has the later steps")
    line = arguments(store, run, save_total_limit=9, resume=step_folder(run, 4))
    assert run_ranks(train, 2, line) == [0, 0]
    assert_same_run(run, on_two)
    aside = run / "before-1"
    assert [p.name for p in list_checkpoints(aside)] == ["step-00000008", "step-00000012"]
    assert json.loads((aside / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 12
    assert (aside / "wandb-id.txt").exists()
    assert not (run / "wandb-id.txt").exists()


def test_a_run_without_a_checkpoint_leaves_nothing_to_the_next_in_its_folder_but_its_model(tmp_path: Path) -> None:
    for name in ("wandb-id.txt", "config.json", "metrics.jsonl"):
        (tmp_path / name).write_text("")
    (tmp_path / "hf").mkdir()
    set_aside(tmp_path, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["before-1", "config.json", "metrics.jsonl"]
    assert [path.name for path in (tmp_path / "before-1").iterdir()] == ["hf"]
