"""metrics.jsonl, and the views of it: plain lines, the live panel, Weights & Biases.

pytest tests/watch/test_log.py
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.tiny import arguments, metrics, tiny_store
from tests.trained import text_store
from wikift.base.errors import EnvironmentFault
from wikift.watch.log import Log, duration, keep_until, line, open_log, panel, read_metrics

ROOT = Path(__file__).resolve().parents[2]
FULL: dict[str, Any] = {
    "step": 1_234_567, "loss": 3.21, "grad_norm": 0.987, "learning_rate": 4.8e-5, "tokens": 10**10,
    "tokens_per_second": 1_234_567.0, "memory_gb": 39.99, "seconds_left": 100_000.0, "mfu": 0.41, "skipped_steps": 3,
    "eval_loss": 3.1, "eval_perplexity": 22.19, "eval_word_perplexity": 37.5, "now": "validating 1,234/5,678",
    "saved": "step-01234500",
}  # fmt: skip
SHOWN = (
    "loss 3.2100", "ppl 24.78", "eval loss 3.1000", "eval ppl 22.19", "norm 0.987", "lr 4.80e-05", "tok/s 1,234,567",
    "mfu 41.0%", "memory 39.99 GB", "skipped 3", "now validating 1,234/5,678", "saved step-01234500",
    "time left 27:46:40",
)  # fmt: skip


def a_log(run: Path, **words: Any) -> Any:
    return open_log(run, **{"after_step": 0, "steps": 9, "quiet": True, "wandb": False, "settings": {}, **words})


# --- metrics.jsonl -----------------------------------------------------------------------------------------------


def test_every_line_is_strict_json_and_what_is_not_finite_is_null(tmp_path: Path) -> None:
    with a_log(tmp_path) as log:
        log.record({"step": 1, "loss": math.nan, "grad_norm": math.inf, "eval_loss": -math.inf, "lr": 1e-5})
        written = (tmp_path / "metrics.jsonl").read_text()  # at once, not when the log is closed
        log.record({"step": 2, "loss": 3.0000000000000004})

    def refuse(word: str) -> None:
        raise AssertionError(word)

    assert json.loads(written, parse_constant=refuse) == {
        "step": 1, "loss": None, "grad_norm": None, "eval_loss": None, "lr": 1e-5,
    }  # fmt: skip
    assert metrics(tmp_path)[1] == {"step": 2, "loss": 3.0000000000000004}


@pytest.mark.parametrize(
    "torn", ["", '{"step": 5, "lo', '{"step": 5, "loss": 1.0}', "\x00\x00\x00", '{"step": null}\n', "7\n"]
)
def test_a_resumed_run_has_no_step_twice_and_no_torn_line(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "loss": 1 / step} for step in range(1, 6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:4]) + torn)
    keep_until(path, 3)
    assert metrics(tmp_path) == rows[:3]
    keep_until(path, 3)
    assert metrics(tmp_path) == rows[:3]
    assert [item.name for item in tmp_path.iterdir()] == ["metrics.jsonl"]
    with a_log(tmp_path, after_step=2) as log:
        log.record(rows[2])
    assert metrics(tmp_path) == read_metrics(path) == rows[:3]


def test_a_whole_last_line_without_its_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    keep_until(path, 2)
    with a_log(tmp_path, after_step=2) as log:
        log.record({"step": 3})
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3]
    keep_until(tmp_path / "none", 2)
    assert read_metrics(tmp_path / "none") == []


def test_a_file_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(EnvironmentFault, match=r"metrics\.jsonl cannot be written .* run the same"), a_log(tmp_path):
        pass
    full = Log(open("/dev/full", "w"))  # noqa: SIM115
    with pytest.raises(EnvironmentFault, match=r"No space left.*make room and run the same command"):
        full.record({"step": 1})
    with contextlib.suppress(OSError):
        full.file.close()  # type: ignore[union-attr]


def test_a_log_without_views_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    log = Log()
    log.say("a")
    log.record({"step": 1})
    log.tick(now="b")
    assert capsys.readouterr() == ("", "")


# --- the terminal ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [40, 60, 80, 200])
@pytest.mark.parametrize("values", [{}, {"step": 0}, {"step": 3, "loss": 800.0, "seconds_left": 3.4}, FULL])
def test_the_panel_fits_and_shows_everything(width: int, values: dict[str, Any]) -> None:
    with open(os.devnull, "w") as nowhere:
        console = Console(width=width, record=True, file=nowhere)
        console.print(panel(values, 2_000_000))
        lines = console.export_text().splitlines()
    assert {len(text) for text in lines} == {width}  # a closed frame, nothing sticks out
    assert lines[0].startswith(f"╭─ step {values.get('step', 0):,} of 2,000,000 ─")
    assert lines[-1] == "╰" + "─" * (width - 2) + "╯"
    inside = [text.strip("│ ") for text in lines[1:-1]]
    assert set(inside[0]) <= {"━", "╸", "╺"}  # the bar has a line of its own
    words = " | ".join(inside[1:])
    wanted = SHOWN if values is FULL else ("loss 800.0000", "ppl inf", "time left 0:03") if "loss" in values else ()
    assert all(words.count(part) >= 1 for part in wanted)
    assert bool(words.strip(" |")) == bool(wanted)


def test_the_bar_is_as_long_as_the_run_is_done() -> None:
    with open(os.devnull, "w") as nowhere:
        for step, filled in ((0, 0), (50, 50), (100, 100)):
            console = Console(width=104, record=True, file=nowhere)
            console.print(panel({"step": step}, 100))
            assert console.export_text().count("━") == filled


def test_a_plain_line() -> None:
    text = line(FULL, 2_000_000)
    assert text.startswith("step 1,234,567/2,000,000  loss 3.2100  ppl 24.78  ")
    assert all(part in text for part in SHOWN)
    assert line({"step": 1, "loss": math.nan}, 2) == "step 1/2  loss nan  ppl nan"
    assert [duration(s) for s in (0.4, 59.6, 61, 3725, 360000)] == ["0:00", "1:00", "1:01", "1:02:05", "100:00:00"]


@contextlib.contextmanager
def terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A real pseudo-terminal in place of standard output; at the end the list has what was written, raw."""
    ours, theirs = os.openpty()
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in {"TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": "24"}.items():
        monkeypatch.setenv(name, value)
    found: list[str] = []
    with os.fdopen(theirs, "w", encoding="utf-8") as stream, open(ours, "rb", buffering=0) as reader:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            yield found
        stream.flush()
        os.set_blocking(ours, False)
        raw = b""
        while piece := reader.read(1 << 16):
            raw += piece
    found.append(raw.decode())


def without_colours(raw: str) -> list[str]:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", raw).replace("\r", "").splitlines()


@pytest.mark.parametrize("columns", [60, 200])
def test_on_a_terminal_there_is_one_live_panel(columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(columns, monkeypatch) as written, a_log(tmp_path, steps=2_000_000, quiet=False) as log:
        log.say("a remark [with brackets]")
        log.tick(step=1)
        log.record(FULL)
    assert "\x1b[" in written[0]
    lines = without_colours(written[0])
    assert max(map(len, lines)) <= columns
    assert "a remark [with brackets]" in lines  # whole, and above the panel
    assert not [text for text in lines if text.startswith("step ")]  # no plain lines beside it
    end = "\n".join(lines[max(i for i, text in enumerate(lines) if text.startswith("╭─ step 1,234,567 of")) :])
    assert all(part in end for part in SHOWN)


def test_quiet_is_quiet_on_a_terminal_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(80, monkeypatch) as written, a_log(tmp_path) as log:
        log.say("a")
        log.record(FULL)
    assert written == [""]


def test_a_pipe_gets_plain_lines_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with a_log(tmp_path, quiet=False) as log:
        log.say("a remark")
        log.record({"step": 1, "loss": 1.0})
        log.tick(now="saving")
    out, err = capsys.readouterr()
    assert out == "a remark\nstep 1/9  loss 1.0000  ppl 2.72\n"
    assert err == ""


# --- a whole run, with Weights & Biases --------------------------------------------------------------------------

CANARIES = {"SECRET_CANARY": "canary-71c0ffee", "WANDB_API_KEY": "f00d" * 10, "HF_TOKEN": "hf_canaryTokenOfNobody"}


@pytest.fixture(scope="module")
def wandb_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of wikift train with --wandb in a process of its own, stopped once and gone on with; what it printed."""
    folder = tmp_path_factory.mktemp("wandb")
    store = tiny_store(folder / "store")
    env = {**os.environ, **CANARIES, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    code = (
        "import sys; from wikift.commands.train import main; "
        "[main([*sys.argv[1:], '--max-steps', n]) for n in ('8', '12')]"
    )
    words = arguments(store, folder / "run", wandb=True, quiet=False, lr_scheduler_type="constant")
    line = [sys.executable, "-c", code, *words]
    done = subprocess.run(line, capture_output=True, text=True, cwd=folder, env={**env, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_a_run_in_a_pipe_prints_a_plain_line_a_step(wandb_run: tuple[Path, str]) -> None:
    folder, printed = wandb_run
    assert "\x1b" not in printed
    assert "\r" not in printed
    steps = re.findall(r"^step (\d+)/(?:8|12)  loss (\d\.\d{4})  ppl ", printed, re.MULTILINE)
    assert steps == [(str(row["step"]), f"{row['loss']:.4f}") for row in metrics(folder / "run")]
    assert [row["step"] for row in metrics(folder / "run")] == list(range(1, 13))


def test_wandb_has_what_metrics_has(wandb_run: tuple[Path, str]) -> None:
    """Its own files read back: one for each start, both of the same run."""
    folder, _ = wandb_run
    files = sorted((folder / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert {path.stem for path in files} == {"run-" + (folder / "run" / "wandb-id.txt").read_text()}
    logged: dict[int, dict[str, Any]] = {}
    for path in files:
        for record in wandb_records(path):
            if record.WhichOneof("record_type") == "history":
                items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                logged[record.history.step.num] = {k: v for k, v in items.items() if not k.startswith("_")}
    expected = {row.pop("step"): row for row in metrics(folder / "run")}
    assert logged == expected
    assert all("loss" in row for row in expected.values())
    assert "eval_loss" in expected[4]


def test_wandb_knows_the_settings(wandb_run: tuple[Path, str]) -> None:
    folder, _ = wandb_run
    path = sorted((folder / "run" / "wandb").glob("offline-run-*/run-*.wandb"))[-1]
    (start,) = [r.run for r in wandb_records(path) if r.WhichOneof("record_type") == "run"]
    found = {update.key: json.loads(update.value_json) for update in start.config.update}
    assert (found["max_steps"], found["learning_rate"], found["model"]) == (12, 0.01, "gpt2")
    assert (start.project, start.display_name) == ("wikift", "run")


def test_samples_reach_wandb(tmp_path: Path) -> None:
    store, run = text_store(tmp_path / "store"), tmp_path / "run"
    (tmp_path / "prompts.txt").write_text("The Renaissance\nMaria\n")
    shape = "n_layer=1,n_head=2,n_embd=16,n_positions=32"
    words = {"config_overrides": shape, "block_size": 16, "max_steps": 4, "wandb": True, "sample_steps": 2}
    line = arguments(store.path, run, **words, sample_prompts=tmp_path / "prompts.txt")
    subprocess.run([sys.executable, str(ROOT / "launch" / "train.py"), *line], check=True, timeout=120)
    (path,) = (run / "wandb").glob("offline-run-*/run-*.wandb")
    told: dict[int, Any] = {}
    for record in wandb_records(path):
        if record.WhichOneof("record_type") == "history":
            for item in record.history.item:
                if (item.key or item.nested_key[0]) == "samples":
                    told.setdefault(record.history.step.num, json.loads(item.value_json))
    assert sorted(told) == [2, 4]
    tables = sorted((path.parent / "files" / "media" / "table").glob("samples_*.json"))
    rows = [row for table in tables for row in json.loads(table.read_text())["data"]]
    written = [json.loads(text) for text in (run / "samples.jsonl").read_text().splitlines()]
    assert sorted(rows) == sorted([row["step"], row["prompt"], row["text"]] for row in written)


def test_nothing_of_the_environment_is_in_any_file(wandb_run: tuple[Path, str]) -> None:
    folder, printed = wandb_run
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert any(path.name == "manifest.json" for path in files)
    for value in CANARIES.values():
        assert value not in printed
        assert [path for path in files if value.encode() in path.read_bytes()] == []


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: protobuf messages in LevelDB's log format behind seven bytes of wandb's own.

    https://github.com/google/leveldb/blob/main/doc/log_format.md: blocks of 32 KiB; checksum, length, type, data.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    raw = path.read_bytes()
    assert raw[:4] == b":W&B"
    place, whole = 7, b""
    while place < len(raw):
        if (1 << 15) - place % (1 << 15) < 7:  # too short for a header: padding
            place = (place // (1 << 15) + 1) << 15
            continue
        length, kind = struct.unpack("<HB", raw[place + 4 : place + 7])
        whole += raw[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""
