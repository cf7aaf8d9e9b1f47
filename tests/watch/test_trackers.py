"""Weights & Biases (offline) and TensorBoard: what they have is what metrics.jsonl has, whatever was killed.

pytest tests/watch/test_trackers.py
"""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tiny import arguments, logged, metrics, tiny_store, until
from tests.trained import text_store
from wikift.base.errors import UserError
from wikift.base.files import read_jsonl
from wikift.commands.main import main
from wikift.watch.trackers import open_trackers

ROOT = Path(__file__).resolve().parents[2]
CANARIES = {"SECRET_CANARY": "canary-71c0ffee", "WANDB_API_KEY": "f00d" * 10, "HF_TOKEN": "hf_canaryTokenOfNobody"}
_TRAIN = "import sys; from wikift.commands import main, train; main.run(train.main)"
_TRAIN_THRICE = """
import sys
from wikift.commands.train import main
for words in (["--max-steps", "8"], ["--max-steps", "12"], ["--resume", "never", "--max-steps", "4"]):
    main([*sys.argv[1:], *words])
"""


def python(code: str, words: list[str], folder: Path, *options: str, **env: str) -> subprocess.CompletedProcess[str]:
    env = {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env}
    line = [sys.executable, *options, "-c", code, *words]
    return subprocess.run(line, capture_output=True, text=True, cwd=folder, env=os.environ | env, timeout=180)


def test_wandb_has_what_metrics_has_and_a_new_run_is_new_there(tmp_path: Path) -> None:
    """A run, resumed, and another in its folder (--resume never); wandb's own files are read back.

    A start's file has the whole run, and the file before it is put aside.
    """
    run, old = tmp_path / "run", tmp_path / "run" / "before-1"
    settings = {"report_to": "wandb", "quiet": False, "lr_scheduler_type": "constant", "max_steps": None}
    words = arguments(tiny_store(tmp_path / "store"), run, **settings)
    done = python(_TRAIN_THRICE, words, tmp_path, **CANARIES)
    assert done.returncode == 0, done.stderr
    starts, identities = wandb_files(run), [(folder / "wandb-id.txt").read_text() for folder in (old, run)]
    assert [path.stem for path in starts] == [f"run-{identity}" for identity in identities]
    assert identities[0] != identities[1]
    assert len(list((run / "wandb").glob("replayed-offline-run-*"))) == 1
    for folder, path, steps in ((old, starts[0], 12), (run, starts[1], 4)):
        logged = list(history(path))
        assert [step for step, _ in logged] == list(range(1, steps + 1))
        for (step, values), row in zip(logged, metrics(folder), strict=True):
            assert values["train/global_step"] == step
            assert (values["train/loss"], values["train/grad_norm"]) == (row["loss"], row["grad_norm"])
            assert values.get("eval/loss") == row.get("eval_loss")
            assert values["train/epoch"] == row["tokens"] / (51 * 8)
            assert values["system/tokens_per_second"] == row["tokens_per_second"]
            ours = [name for name in values if not name.startswith("_")]
            assert len(ours) == len(row) + 1, "each key once, and the epoch"
    records = list(wandb_records(starts[0]))
    (start,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    config = {update.key: json.loads(update.value_json) for update in start.config.update}
    assert (config["max_steps"], config["learning_rate"], config["model"]) == (12, 0.01, "gpt2")
    assert config["derived"]["tokens_per_step"] == 64
    facts = config["environment"]
    assert (facts["engine"], facts["precision"], facts["ranks"]) == ("single", "fp32", 1)
    assert (start.project, start.display_name) == ("wikift", "run")
    axes = {r.metric.name or r.metric.glob_name: r.metric for r in records if r.WhichOneof("record_type") == "metric"}
    assert axes["eval/loss"].summary.min
    assert axes["*"].step_metric == "train/global_step"
    # standard output is a pipe: a plain line a step
    assert not set("\x1b\r") & set(done.stdout)
    lines = re.findall(r"^step (\d+)/(?:8|12|4)  loss (\d\.\d{4})  ppl ", done.stdout, re.MULTILINE)
    assert lines == [(str(row["step"]), f"{row['loss']:.4f}") for row in metrics(old) + metrics(run)]
    # nothing of the environment is in any file
    contents = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {starts[0].name, "manifest.json"} <= set(contents)
    for value in CANARIES.values():
        assert [name for name, content in contents.items() if value.encode() in content] == []
        assert value not in done.stdout


def test_samples_reach_wandb(tmp_path: Path) -> None:
    run, prompts = tmp_path / "run", tmp_path / "prompts.txt"
    prompts.write_text("The Renaissance\nMaria\n")
    words = {"config_overrides": "n_layer=1,n_head=2,n_embd=16,n_positions=32", "block_size": 16, "max_steps": 4}
    words |= {"wandb": True, "sample_steps": 2, "sample_prompts": prompts}
    swept = {"WANDB_TAGS": "a,b", "WANDB_RUN_GROUP": "group", "WANDB_NOTES": "notes", "WANDB_SWEEP_ID": "sweep"}
    swept |= {"WANDB_RUN_ID": "chosen", "WANDB_PROJECT": "mine"}
    line = arguments(text_store(tmp_path / "store").path, run, **words)
    assert python(_TRAIN, line, tmp_path, **swept).returncode == 0
    (path,) = wandb_files(run)
    (start,) = [record.run for record in wandb_records(path) if record.WhichOneof("record_type") == "run"]
    assert (start.run_id, start.project, start.run_group) == ("chosen", "mine", "group")
    assert (list(start.tags), start.notes, start.sweep_id) == (["a", "b"], "notes", "sweep")
    assert (run / "wandb-id.txt").read_text() == "chosen"
    assert [step for step, values in history(path) if "samples/_type" in values] == [2, 4]
    tables = sorted((path.parent / "files" / "media" / "table").glob("samples_*.json"))
    rows = [row for table in tables for row in json.loads(table.read_text())["data"]]
    assert sorted(rows) == sorted(list(row.values()) for row in read_jsonl(run / "samples.jsonl"))


def test_without_wandb_the_extra_is_named_before_anything_is_written(tmp_path: Path) -> None:
    """An environment that has all but wandb, started where an earlier run left a folder of that name."""
    import wandb

    (tmp_path / "site").mkdir()
    (tmp_path / "wandb").mkdir()
    for item in Path(wandb.__file__).parents[1].iterdir():
        if not item.name.startswith("wandb"):
            (tmp_path / "site" / item.name).symlink_to(item)
    words = arguments(tiny_store(tmp_path / "store"), tmp_path / "run", wandb=True, report_to="mlflow", seed=-1)
    done = python(_TRAIN, words, tmp_path, "-S", PYTHONPATH=f"{ROOT}:{tmp_path / 'site'}")
    assert done.returncode == 2, done.stderr
    assert 'pip install "wikift[wandb]"' in done.stderr
    assert "--report-to mlflow: must be wandb or tensorboard" in done.stderr
    assert "--seed -1" in done.stderr  # with the other problems
    assert not (tmp_path / "run").exists()


def test_a_replay_into_tensorboard_or_a_table_is_whole_and_the_same_twice(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    words = arguments(tiny_store(tmp_path / "store"), tmp_path / "run", report_to="tensorboard")
    done = python(
        _TRAIN_THRICE, words[: words.index("--max_steps")] + words[words.index("--max_steps") + 2 :], tmp_path
    )
    assert done.returncode == 0, done.stderr
    replayed = tmp_path / "run" / "before-1"
    for folder, again in ((replayed, False), (replayed, True), (tmp_path / "run", False)):
        if again:
            assert main(["log", str(folder), "--to", "tensorboard"]) == 0
        events = accumulator.EventAccumulator(str(folder / "tensorboard")).Reload()
        for tag, key in (("train/loss", "loss"), ("eval/loss", "eval_loss"), ("system/memory_gb", "memory_gb")):
            expected = [(row["step"], np.float32(row[key])) for row in metrics(folder) if key in row]
            assert [(scalar.step, scalar.value) for scalar in events.Scalars(tag)] == expected
    assert main(["log", str(replayed)]) == 0
    with open(replayed / "metrics.csv") as file:
        table = list(csv.DictReader(file))
    assert [(int(row["step"]), float(row["loss"])) for row in table] == [
        (r["step"], r["loss"]) for r in metrics(replayed)
    ]


def test_a_run_goes_on_without_wandbs_service_and_with_a_full_home(tmp_path: Path, small_home: Path) -> None:
    run = tmp_path / "run"
    words = arguments(tiny_store(tmp_path / "store"), run, report_to="wandb", max_steps=400, save_steps=100)
    environment = os.environ | {"HOME": str(small_home), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(tmp_path / "printed", "w") as printed:
        process = subprocess.Popen(
            [sys.executable, "-c", _TRAIN, *words], env=environment, stdout=printed, stderr=printed, cwd=tmp_path
        )
    until(lambda: logged(run) >= 50, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (service,) = [pid for pid in children if b"wandb-core" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(int(service), signal.SIGKILL)
    assert process.wait(120) == 0
    text = (tmp_path / "printed").read_text()
    assert text.count("wikift: warning: Weights & Biases failed (") == 1
    assert "Traceback" not in text
    log = [sys.executable, "-m", "wikift", "log", str(run), "--to", "wandb"]
    subprocess.run(log, env=environment, check=True, timeout=120)  # wandb's file is whole when the process ends
    assert [step for step, _ in history(wandb_files(run)[-1])] == list(range(1, 401))


@pytest.fixture
def small_home(tmp_path: Path) -> Iterator[Path]:
    """A home folder on a disk that is full."""
    (tmp_path / "home").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path / "home"]).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    with pytest.raises(OSError, match="No space left"):
        (tmp_path / "home" / "large").write_bytes(bytes(1 << 17))
    yield tmp_path / "home"
    subprocess.run(["umount", "-l", tmp_path / "home"], check=True)


def test_what_log_cannot_do_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"wikift": "0.2.0"}')
    monkeypatch.setenv("WANDB_DISABLED", "true")
    with pytest.raises(UserError) as caught:
        main(["log", str(tmp_path), "--to", "wandb", "--model"])
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["--to wandb", "--model"]
    with open_trackers(tmp_path, ["wandb"], quiet=True) as trackers:
        assert trackers == []
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.long
def test_what_was_killed_three_times_is_whole_and_has_no_step_twice(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = arguments(
        tiny_store(tmp_path / "store"), run, report_to="wandb", max_steps=2000, save_steps=50, eval_steps=50
    )
    environment = os.environ | {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for lines in (120, 330, 560):
        process = subprocess.Popen([sys.executable, "-c", _TRAIN, *words], env=environment, cwd=tmp_path)
        until(lambda: logged(run) >= lines, process)  # noqa: B023
        process.kill()
        process.wait()
    words[words.index("2000")] = "700"
    assert python(_TRAIN, words, tmp_path).returncode == 0
    (path,) = wandb_files(run)
    sent = [(step, values["train/loss"]) for step, values in history(path)]
    assert sent == [(row["step"], row["loss"]) for row in metrics(run)]
    assert [step for step, _ in sent] == list(range(1, 701))


def wandb_files(run: Path) -> list[Path]:
    """The files that `wandb sync --sync-all` would send, in order."""
    return sorted((run / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns)


def history(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(step, values) of all that was logged."""
    for record in wandb_records(path):
        if record.WhichOneof("record_type") == "history":
            values = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            yield record.history.step.num, values


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: protobuf messages in LevelDB's log format behind seven bytes of wandb's own.

    https://github.com/google/leveldb/blob/main/doc/log_format.md: blocks of 32 KiB; checksum, length, type, data.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    raw, position, message = path.read_bytes(), 7, b""
    assert raw[:4] == b":W&B"
    while position < len(raw):
        if (1 << 15) - position % (1 << 15) < 7:  # too short for a header: padding
            position = (position // (1 << 15) + 1) << 15
            continue
        length, kind = struct.unpack("<HB", raw[position + 4 : position + 7])
        message += raw[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # complete, or the last part
            yield Record.FromString(message)
            message = b""
