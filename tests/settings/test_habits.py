"""Names of other tools: each is answered by an option that exists, or by a sentence."""

from __future__ import annotations

import dataclasses
import re
import shlex

import pytest

from wikift.base.errors import UserError
from wikift.settings.habits import answer, habits, options_in
from wikift.settings.options import flag, parse
from wikift.settings.run_fields import SETTINGS

CLASSES = {name: SETTINGS[name] for name in ("train", "prepare", "consolidate", "evaluate", "generate")}
NAMES = [name for names, _ in habits() for name in names]


def flags(command: str) -> list[str]:
    return [flag(field.name) for field in dataclasses.fields(CLASSES[command]) if not field.metadata["positional"]]


def test_the_table_has_each_name_once_and_no_alternative_in_vain() -> None:
    assert len(NAMES) == len(set(NAMES)) > 60
    for names, alternatives in habits():
        for name in names:
            used = {answer(name, flags(command)) for command in CLASSES} - {""}
            assert used == set(alternatives), name
            assert any(flag(name) not in flags(command) for command in CLASSES), "it is a name of ours"


@pytest.mark.parametrize("command", CLASSES)
def test_what_is_answered_is_taken_by_the_command(command: str) -> None:
    known = flags(command)
    for name in NAMES:
        text = answer(name, known)
        assert set(options_in(text)) <= set(known)
        for other in re.findall("`wikift (.*?)`", text):
            program, *line = shlex.split(other)
            parse(CLASSES[program], line)
        option = text.partition("; ")[0]
        if re.match("--.* [a-z]", option) and (name, command) != ("fp16", "generate"):  # an option with its value
            parse(CLASSES[command], shlex.split(option.replace("VALUE", "300")))


@pytest.mark.parametrize("command", CLASSES)
def test_a_name_of_another_tool_is_one_problem(command: str) -> None:
    """With and without its value, which never becomes a problem of its own."""
    for name in NAMES:
        text = answer(name, flags(command))
        for line in ([f"--{name}", "5"], [f"--{name}=5"], ["--" + name.replace("_", "-")]):
            if flag(name) in flags(command) or not text:
                continue
            with pytest.raises(UserError) as caught:
                parse(CLASSES[command], line)
            (problem,) = caught.value.problems
            assert re.match(r"--[\w-]+: (is --\S.* here|omit it, \S|name it without an option)", problem), problem
            assert "VALUE" not in problem or len(line) == 1
