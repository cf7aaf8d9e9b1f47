"""`wikift`, its forms, and the form that help and messages name. pytest tests/commands/test_program.py"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import wikift
from tests.tiny import arguments, metrics, tiny_store
from wikift.base.command import as_typed, command_line, program_of
from wikift.commands.main import main, run
from wikift.settings.run_fields import SETTINGS

ROOT = Path(__file__).resolve().parents[2]
MODULE = str(ROOT / "wikift" / "__main__.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"], ["-h"]):
        assert main(words) == 0
        text = capsys.readouterr().out
        assert text.startswith("usage: wikift COMMAND [options]\n")
        assert all(f"\n  {name} " in text for name in SETTINGS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"wikift {wikift.__version__}\n"


@pytest.mark.parametrize(("word", "hint"), [("trian", " (did you mean train?)"), ("zzz", "")])
def test_a_command_that_there_is_not(word: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        run(main, [word])
    assert left.value.code == 2
    assert f"{word}: no such command{hint}; one of prepare, train" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "train", "torchrun"),
    [
        ("/usr/bin/wikift", "wikift train", "torchrun -m wikift train"),
        ("/usr/bin/pytest", "wikift train", "torchrun -m wikift train"),
        (MODULE, "python -m wikift train", "torchrun -m wikift train"),
        ("launch/generate.py", "python launch/train.py", "torchrun launch/train.py"),
        (f"{ROOT}/launch/train.py", f"python {ROOT}/launch/train.py", f"torchrun {ROOT}/launch/train.py"),
        ("elsewhere/launch/train.py", "wikift train", "torchrun -m wikift train"),
    ],
)
def test_the_form_that_was_typed(typed: str, train: str, torchrun: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [typed, "train"])
    assert command_line("train") == train
    assert as_typed("torchrun -m wikift train") == torchrun
    assert as_typed("what wikift trains, wikift plan") == f"what wikift trains, {train.replace('train', 'plan')}"
    program = program_of("train")
    assert Path(program[-1]).stem == "train"
    assert program[0] == ("/usr/bin/wikift" if typed.endswith("/wikift") else sys.executable)


def test_in_the_folder_of_the_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / "launch")
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert command_line("generate") == "python generate.py"


def test_torchrun_takes_the_module(tmp_path: Path) -> None:
    """And the next command is in its form; the script's: test_launchers.py."""
    words = arguments(tiny_store(tmp_path / "store"), tmp_path / "run", max_steps=3, quiet=False)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*TORCHRUN, "-m", "wikift", "train", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"\n  python -m wikift consolidate {tmp_path / 'run'}" in done.stdout
    assert len(metrics(tmp_path / "run")) == 3
