"""README and docs: every command parses, every file named exists, the settings page is up to date."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from wikift.settings.options import parse
from wikift.settings.run_fields import SETTINGS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "ds_configs" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OTHER_PROGRAMS = ("source", "hf", "kubectl")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks marked with `language`, without their fences."""
    parts = re.split(r"^```(.*)\n", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [block for mark, block in zip(parts[1::4], parts[2::4], strict=True) if mark == language]


def commands() -> list[str]:
    """Every line of every `sh` block."""
    text = "\n".join(block for page in PAGES for block in blocks(page, "sh"))
    return sorted({line for line in text.replace("\\\n", " ").splitlines() if line.strip()})


def wikift_command(command: str) -> tuple[str, list[str]] | None:
    """(name, arguments) of the wikift command that a command line starts; None where it starts none."""
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    program, *rest = words
    if program == "sbatch":
        assert (ROOT / rest[0]).is_file()
        return "train", rest[1:]
    if program == "torchrun":
        from torch.distributed.run import get_args_parser

        parsed = get_args_parser().parse_args(rest)
        program, rest = parsed.training_script, parsed.training_script_args
        assert parsed.module == (program == "wikift")
    elif program == "deepspeed":
        from deepspeed.launcher.runner import parse_args

        parsed = parse_args(rest)
        program, rest = parsed.user_script, parsed.user_args
    elif program == "python":
        if rest[0] == "-m":
            rest = rest[1:]
        program, *rest = rest
    if program == "wikift":
        program, *rest = rest
    elif program.startswith("launch/"):
        assert (ROOT / program).is_file()
        program = Path(program).stem
    else:
        return None
    assert program in SETTINGS, command
    return program, rest


@pytest.mark.parametrize("command", commands())
def test_every_command_parses(command: str) -> None:
    program, *rest = shlex.split(command)
    found = wikift_command(command)
    if found is not None:
        settings = parse(SETTINGS[found[0]], found[1])
        config = getattr(settings, "deepspeed", None)
        assert config is None or (ROOT / config).is_file() or (ROOT / "ds_configs" / f"{config}.json").is_file()
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(rest) <= set(targets)
    elif program == "python":
        path = rest[1].replace(".", "/") + ".py" if rest[0] == "-m" else rest[0]
        assert (ROOT / path).is_file() or path.startswith(("torch/", "FOLDER/")), "no such file"
    else:
        assert program in OTHER_PROGRAMS


def test_python_blocks_compile() -> None:
    for page in PAGES:
        for block in blocks(page, "python"):
            compile(block, str(page), "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_and_page_named_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:launch|tests|wikift|ds_configs|docs|benchmarks)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name
    for link in re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", text):
        assert (page.parent / link).is_file(), link


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    named = set(re.findall(r"[\w/-]+\.md", navigation))
    assert named == {str(page.relative_to(ROOT / "docs")) for page in PAGES if ROOT / "docs" in page.parents}


def test_the_messages_quoted_are_in_the_code() -> None:
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "wikift").rglob("*.py"))
    page = (ROOT / "docs" / "how-to" / "hub-errors.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| `([^-`][^`]*)`", page, re.MULTILINE)
    assert len(quoted) == 6
    assert [message for message in quoted if message not in code] == []


def test_the_settings_page_is_up_to_date() -> None:
    code = "import make_settings as m, sys; sys.exit(m.page() != m.PAGE.read_text(encoding='utf-8'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "docs", timeout=60)
    assert done.returncode == 0, "out of date: run python docs/make_settings.py"
