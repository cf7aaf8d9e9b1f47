"""Names of other tools that people type by habit, and what they are here: habits.txt."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from wikift.settings.arguments import Wrong, flag


def habits() -> Iterator[tuple[list[str], list[str]]]:
    """(names, alternatives) of each line of habits.txt."""
    for line in Path(__file__).with_name("habits.txt").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            names, _, answers = line.partition(": ")
            yield names.split(), answers.split(" | ")


def answer(name: str, flags: Sequence[str]) -> str:
    """What `name` is in a command with the options `flags`: an option, a sentence, or nothing where it is unknown."""
    texts = next((alternatives for names, alternatives in habits() if name in names), [])
    return next((text for text in texts if set(flags).issuperset(options_in(text))), "")


def options_in(text: str) -> list[str]:
    """The options that a text names, but for those of the commands in backquotes."""
    return re.findall(r"--[a-z][a-z0-9-]*", re.sub("`[^`]*`", "", text))


def unknown(typed: str, value: str, flags: Sequence[str], where: str = "") -> Wrong:
    """The problem of an option that does not exist, with the one that was meant as far as that shows.

    `typed` has dashes on a command line; `where` is " in FILE" for a config file.
    """
    name = typed.lstrip("-").rpartition(".")[2].replace("-", "_")  # LitGPT has --train.max_steps
    meant, setting = f"{flag(name)} VALUE" if flag(name) in flags else answer(name, flags), ""
    if meant.startswith("--"):
        setting = options_in(meant)[0]
        with_value = value and value.lower() not in ("true", "false")
        text = meant.replace("VALUE", shlex.quote(value)) if with_value else meant.replace(" VALUE", "")
        option, semicolon, note = text.partition("; ")
        text = "omit it" if value.lower() == "false" else f"is {option} here{semicolon}{note}"
    elif meant:
        text = meant
    elif near := difflib.get_close_matches(flag(name), flags, n=1, cutoff=0.8):
        setting, text = near[0], f"unknown option (did you mean {near[0]}?)"
    else:
        text = "unknown option; see --help"
    if not typed.startswith("-"):  # of a config file or a Python call
        text = re.sub(r"--(?!help)([a-z][a-z0-9-]*)", lambda match: match[1].replace("-", "_"), text)
    return Wrong(f"{typed}{where}: {text}", setting.lstrip("-").replace("-", "_"))
