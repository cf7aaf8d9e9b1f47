"""No model yet: generate trains one first. Run: pytest tests/commands/test_first_training.py"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.terminal import Terminal
from tests.tiny import arguments
from tests.trained import text_store
from wikift.base import folders
from wikift.base.errors import UserError
from wikift.commands.generate import main

ROOT = Path(__file__).resolve().parents[2]
GENERATE = [sys.executable, str(ROOT / "launch" / "generate.py")]
SCRIPT = "Hänsch — 東京 🜚 ﷺ…\nend"


# --- no model yet --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder_with_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    text_store(tmp_path / "store")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def training(folder: Path, **values: Any) -> list[str]:
    shape = "n_layer=2,n_head=2,n_embd=32,n_positions=32"
    words = arguments(folder / "store", folder, config_overrides=shape, block_size=16, **values)
    place = words.index("--output_dir")
    return words[:place] + words[place + 2 :]


def test_training_comes_first_where_there_is_no_model(
    folder_with_store: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [
        "runs/new",
        "--prompt",
        "The",
        "--json",
        "--device",
        "cpu",
        "--",
        *training(folder_with_store, quiet=False),
    ]
    assert main(words) == 0
    out, err = capfd.readouterr()
    found = json.loads(out)  # the training's own words went to standard error
    assert found["model"] == "runs/new/hf"
    assert "runs/new has no model yet" in err
    assert "wikift train --output-dir runs/new --data" in err
    assert "step 12/12" in err
    assert folders.checkpoint_steps(Path("runs/new"))[-1] == 12
    # again: it is there
    assert main(words) == 0
    again, err = capfd.readouterr()
    assert json.loads(again)["text"] == found["text"]
    assert "nothing is trained" in err


def test_a_training_that_fails_or_trains_nothing(folder_with_store: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = training(folder_with_store)
    words[words.index("--data") + 1] = "nowhere"
    assert main(["runs/new", "--prompt", "The", "--", *words]) == 2
    assert "nowhere" in capfd.readouterr().err
    with pytest.raises(UserError, match="left no checkpoint"):
        main(["runs/new", "--prompt", "The", "--", *training(folder_with_store), "--dry-run"])


def test_a_stopped_training_is_saved_and_its_exit_code_passed_on(folder_with_store: Path) -> None:
    words = ["runs/new", "--prompt", "The", "--json", "--device", "cpu", "--"]
    long = training(folder_with_store, max_steps=10**6, save_steps=10**6, eval_steps=10**6)
    child = subprocess.Popen(
        [*GENERATE, *words, *long], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    metrics = Path("runs/new/metrics.jsonl")
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    child.send_signal(signal.SIGTERM)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 75, err
    assert out == b""
    assert b"the same command goes on" in err
    assert len(folders.checkpoint_steps(Path("runs/new"))) == 1


def test_on_a_terminal_it_asks_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    terminal = Terminal([*GENERATE, "runs/new", "--prompt", "a"])
    terminal.wait_for(r"train it now\? \[Y/n\] ")
    terminal.send("n\n")
    terminal.wait_for(r"launch/generate\.py runs/new")
    assert terminal.exit_code() == 2
    assert list(tmp_path.iterdir()) == []
