"""The commands that wikift prints are run as they are printed, where names have spaces and quotes."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.tiny import SHAPE
from wikift.commands.main import main

CPU = ["--device", "cpu"]


@pytest.fixture
def typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> object:
    """Runs a command line; returns the command lines that it prints, by command."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["wikift"])

    def run(line: str, *more: str) -> dict[str, str]:
        assert main([*shlex.split(line)[1:], *more]) == 0
        printed = capsys.readouterr()
        return {m[2]: m[1] for m in re.finditer(r"(wikift (\w+) .*)$", printed.out + printed.err, re.MULTILINE)}

    return run


def test_printed_commands_run_as_they_stand(typed: object, tmp_path: Path) -> None:
    assert callable(typed)
    (tmp_path / "it's a text.txt").write_text("".join(f"The tower {n} is {n * n} metres tall .\n" for n in range(500)))
    line = 'wikift prepare --dataset "it\'s a text.txt" --tokenizer train:300 --out "a store\'s"'
    after = typed(line)
    assert after == {"train": "wikift train --data 'a store'\"'\"'s' --from-scratch"}
    assert typed(f"{line} --verify") == after
    tiny = ["--config-overrides", SHAPE, "--block-size", "16", "--max-steps", "2", "--output-dir", "it's a run"]
    after = typed(after["train"], *tiny, *CPU)
    assert set(after) == {"consolidate", "generate"}
    typed(after["generate"], "--prompt", "The", "--max-new-tokens", "1", *CPU)
    after = typed(after["consolidate"])
    assert set(after) == {"evaluate", "generate"}
    typed(after["evaluate"], *CPU)
    # away from its run a model does not know its text
    after = typed('wikift consolidate "it\'s a run" --out "else\'s where" --dtype bfloat16')
    typed(after["evaluate"], *CPU)
    # an export that is older than the run, made again as it was
    typed('wikift consolidate "it\'s a run" --dtype bfloat16')
    record = tmp_path / "it's a run" / "hf" / "wikift.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "step": 1}))
    after = typed('wikift generate "it\'s a run" --prompt The --max-new-tokens 1', *CPU)
    typed(after["consolidate"])
    assert json.loads(record.read_text())["step"] == 2
    assert json.loads(record.read_text())["dtype"] == "bfloat16"


def test_prepare_names_the_model_of_its_tokenizer(typed: object, tmp_path: Path) -> None:
    assert callable(typed)
    (tmp_path / "short.txt").write_text("a few words\n" * 20)
    after = typed("wikift prepare --dataset short.txt --tokenizer train:260 --out short")
    assert re.fullmatch("wikift train --data short --from-scratch --block-size (64|128)", after["train"])
    typed(after["train"], "--dry-run")
    model = tmp_path / "my model"
    model.mkdir()
    for path in (tmp_path / "short" / "tokenizer").iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    after = typed("wikift prepare --dataset short.txt --tokenizer 'my model' --out other")
    assert "--from-scratch" in after["train"]
    (model / "config.json").write_text('{"model_type": "gpt2", "n_positions": 32, "vocab_size": 260}')
    (model / "model.safetensors").touch()
    after = typed("wikift prepare --dataset short.txt --tokenizer 'my model' --out other")
    assert after["train"].startswith("wikift train --data other --model 'my model'")
