"""Write docs/reference/settings.md from the settings classes: python docs/make_settings.py

tests/test_readme.py fails where the page is out of date.
"""

from __future__ import annotations

import dataclasses
import sys
import typing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from wikift.settings.habits import answer, habits
from wikift.settings.options import flag
from wikift.settings.run_fields import SETTINGS

PAGE = Path(__file__).resolve().parent / "reference" / "settings.md"
ON_RESUME = {"experiment": "fixed", "schedule": "may change", "placement": "may change", "view": ""}
INTRODUCTION = """\
# Settings

*Generated from the code by `python docs/make_settings.py`.*

Every setting is a command-line option; `-` and `_` are the same in its name. `wikift prepare` and `wikift train` also
take settings from a TOML or JSON file, `--config FILE`. The command line overrides the file, and `--no-NAME` turns off
a switch that the file turns on. `wikift plan` (or `wikift train --dry-run`) prints every setting with its value as
such a file, and what follows from it.

A setting that would have no effect is an error, and all errors of a command line are reported at once.
"""

RESUME = """\
*Resume*: when a run is resumed, a setting that is *fixed* must have its old value (data is compared by content); one
that *may change* is printed if it did; all others may change silently.
"""

OTHERS = """\
## Names of other tools

What people type by habit, of run_clm.py, `TrainingArguments`, accelerate and nanoGPT, is an error that names what it is
here. VALUE is what was typed.

| Name | Here |
|---|---|
"""


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for command, settings in SETTINGS.items():
        parts.append(f"## wikift {command}\n")
        if command == "train":
            parts.append(RESUME)
        options = [field for field in dataclasses.fields(settings) if field.init]
        if command == "plan":
            parts.append("All settings of `wikift train`, and:\n")
            options = [field for field in options if field.metadata["group"] == "plan"]
        positional = [field for field in options if field.metadata["positional"]]
        groups = dict.fromkeys(field.metadata["group"] for field in options if not field.metadata["positional"])
        if positional:
            parts.append(table("Argument", positional, command))
        for group in groups:
            rows = [f for f in options if f.metadata["group"] == group and not f.metadata["positional"]]
            parts.append(table(group.capitalize() if len(groups) > 1 else "Option", rows, command))
    return "\n".join([*parts, OTHERS + "\n".join(other_names()) + "\n"])


def other_names() -> list[str]:
    """A row for each line of habits.txt; where commands differ, which one has the option."""
    flags = {
        command: [flag(field.name) for field in dataclasses.fields(settings) if not field.metadata["positional"]]
        for command, settings in SETTINGS.items()
        if command != "plan"  # which has those of train
    }
    rows = []
    for names, _ in habits():
        answers: dict[str, list[str]] = {}
        for command in flags:
            if text := answer(names[0], flags[command]):
                option, semicolon, note = text.partition("; ")
                text = f"`{option}`{semicolon}{note}" if option.startswith("--") else text
                answers.setdefault(text, []).append(command)
        cells = [text + f" ({', '.join(commands)})" * (len(answers) > 1) for text, commands in answers.items()]
        rows.append(f"| {', '.join(f'`--{name}`' for name in names)} | {'; '.join(cells)} |")
    return rows


def table(title: str, options: list[dataclasses.Field[typing.Any]], command: str) -> str:
    """One group of settings; the title is the heading of its first column."""
    resumes = command == "train"
    lines = [f"| {title} | Meaning | Default |" + " Resume |" * resumes, "|---|---|---|" + "---|" * resumes]
    for field in options:
        meta = field.metadata
        value = meta["metavar"] or "|".join(meta["choices"])
        if not value and str(field.type).startswith(("int", "float")):
            value = "N"
        name = value if meta["positional"] else flag(field.name) + (f" {value}" if value else "")
        # the HTML of a code span: Markdown's readers disagree on a | in one
        cells = [f"<code>{escaped(name)}</code>", escaped(meta["help"]), escaped(default(field))]
        cells += [ON_RESUME[meta["role"]]] * resumes
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def default(field: dataclasses.Field[typing.Any]) -> str:
    """What the setting is where nobody sets it, in words where that depends on other settings."""
    if field.metadata["shown"] is not None:
        return str(field.metadata["shown"])
    if field.default is True:
        return f"on; `{flag('no_' + field.name)}` turns it off"
    return "" if field.default in (None, "", ()) or field.default is False else f"{field.default}"


def escaped(text: str) -> str:
    """`text` in a cell of a Markdown table."""
    return text.replace("|", "&#124;").replace("train.*, validation.*, test.*", "`train.*`, `validation.*`, `test.*`")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
