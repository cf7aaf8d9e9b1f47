"""Weights & Biases, offline: what it has is what metrics.jsonl has, and which starts are one run there.

pytest tests/watch/test_trackers.py
"""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.tiny import arguments, metrics, tiny_store
from tests.trained import text_store
from wikift.base.files import read_jsonl

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
    """A run, resumed, and another in its folder (--resume never); wandb's own files are read back, one a start."""
    run, old = tmp_path / "run", tmp_path / "run" / "before-1"
    settings = {"wandb": True, "quiet": False, "lr_scheduler_type": "constant", "max_steps": None}
    words = arguments(tiny_store(tmp_path / "store"), run, **settings)
    done = python(_TRAIN_THRICE, words, tmp_path, **CANARIES)
    assert done.returncode == 0, done.stderr
    starts, identities = wandb_files(run), [(folder / "wandb-id.txt").read_text() for folder in (old, old, run)]
    assert [path.stem for path in starts] == [f"run-{identity}" for identity in identities]
    assert identities[0] != identities[2]
    for folder, files, steps in ((old, starts[:2], 12), (run, starts[2:], 4)):
        logged = {
            step: {name: value for name, value in values.items() if not name.startswith("_")}
            for path in files
            for step, values in history(path)
        }
        expected = {row.pop("step"): row for row in metrics(folder)}
        assert logged == expected
        assert list(expected) == list(range(1, steps + 1))
        assert all("loss" in row for row in expected.values())
        assert "eval_loss" in expected[4]
    (start,) = [record.run for record in wandb_records(starts[1]) if record.WhichOneof("record_type") == "run"]
    config = {update.key: json.loads(update.value_json) for update in start.config.update}
    assert (config["max_steps"], config["learning_rate"], config["model"]) == (12, 0.01, "gpt2")
    assert (start.project, start.display_name) == ("wikift", "run")
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
    assert python(_TRAIN, arguments(text_store(tmp_path / "store").path, run, **words), tmp_path).returncode == 0
    (path,) = wandb_files(run)
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
    words = arguments(tiny_store(tmp_path / "store"), tmp_path / "run", wandb=True, seed=-1)
    done = python(_TRAIN, words, tmp_path, "-S", PYTHONPATH=f"{ROOT}:{tmp_path / 'site'}")
    assert done.returncode == 2, done.stderr
    assert 'pip install "wikift[wandb]"' in done.stderr
    assert "--seed -1" in done.stderr  # with the other problems
    assert not (tmp_path / "run").exists()


def wandb_files(run: Path) -> list[Path]:
    """A file for each start that wandb recorded in a run's folder, in order."""
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
