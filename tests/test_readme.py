"""The README says what is so: its commands parse, its files exist, its tree is complete.

pytest tests/test_readme.py
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from wikift.settings import fields as config
from wikift.settings import options as cli

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SETTINGS = {
    "launch/prepare.py": config.PrepareSettings,
    "launch/train.py": config.TrainSettings,
    "launch/consolidate.py": config.ConsolidateSettings,
    "launch/evaluate.py": config.EvaluateSettings,
    "launch/generate.py": config.GenerateSettings,
}


def blocks(language: str) -> list[str]:
    """The fenced blocks marked with `language`, without their fences."""
    parts = re.split(r"^```(.*)\n", README, flags=re.MULTILINE)  # text, mark, block, mark of the end, text, ...
    return [block for mark, block in zip(parts[1::4], parts[2::4], strict=True) if mark == language]


def commands() -> list[str]:
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.strip()]
    assert len(lines) > 10
    return lines


@pytest.mark.parametrize("command", commands())
def test_every_command_parses(command: str) -> None:
    words = shlex.split(command)
    if words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets
        return
    assert words[0] in ("python", "torchrun", "deepspeed"), command
    script = next(word for word in words if word.endswith(".py"))
    if words[0] == "torchrun":
        assert all(word.startswith("--nproc_per_node=") for word in words[1 : words.index(script)])
    settings = cli.parse(SETTINGS[script], words[words.index(script) + 1 :], prog=script, description="")
    assert (ROOT / (getattr(settings, "deepspeed", None) or "README.md")).is_file()


def test_the_python_block_compiles_and_every_file_named_exists() -> None:
    for block in blocks("python"):
        compile(block, "README.md", "exec")
    for name in re.findall(r"`((?:launch|tests|wikift|ds_configs)/[\w.]+|[\w.]+\.(?:txt|toml|cfg))`", README):
        if not name.endswith("my.txt"):
            assert (ROOT / name).exists() or name == ".txt", name
