"""The command line of a settings class, by argparse: its words as text by setting, and what `--help` shows."""

from __future__ import annotations

import argparse
import dataclasses
import re
import shutil
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

from wikift.base.errors import UserError

Fields = dict[str, dataclasses.Field[Any]]


def flag(name: str) -> str:
    """The spelling of a setting on the command line: `max_steps` -> `--max-steps`."""
    return "--" + name.replace("_", "-")


def name_of(flag: str) -> str:
    """The setting of a flag, or of a name spelled with dashes: `--max-steps` -> `max_steps`."""
    return flag.lstrip("-").replace("-", "_")


class Wrong(NamedTuple):
    """One problem of a command line, and the setting that it leaves without its value; either may be empty."""

    text: str
    setting: str = ""


def read_words(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[dict[str, Any], list[str], list[Wrong]]:
    """(values by setting, unknown words, problems). A flag that argparse refuses is removed, the rest parsed again."""
    line, problems = _split(argv), list[Wrong]()
    while True:
        try:
            namespace, unknown = parser.parse_known_args(line)
            return {name: value for name, value in vars(namespace).items() if value != []}, unknown, problems
        except argparse.ArgumentError as error:
            names = (error.argument_name or "").split("/")
            rule = "takes no value" if "explicit" in str(error.message) else "needs a value"
            problems.append(Wrong(f"{names[0]}: {rule}; see {parser.prog} --help", name_of(names[0])))
            rest = [word for word in line if word.partition("=")[0] not in names]
            if len(rest) == len(line):
                raise UserError(*(wrong.text for wrong in problems)) from None
            line = rest


def _split(argv: Sequence[str]) -> list[str]:
    """`--max_steps` -> `--max-steps`; `--dropout -1e-5` joined by `=`, as argparse takes the number for an option."""
    line: list[str] = []
    for word in argv:
        if line and line[-1].startswith("--") and "=" not in line[-1] and re.match(r"-(\.?\d|inf|nan)", word):
            line[-1] += "=" + word
        elif word.startswith("--"):
            name, equals, value = word.partition("=")
            line.append(name.replace("_", "-") + equals + value)
        else:
            line.append(word)
    return line


def make_parser(
    fields: Fields, kinds: dict[str, type], prog: str, description: str, epilog: str
) -> argparse.ArgumentParser:
    """The parser of these settings; all values stay text."""
    width = max(60, min(shutil.get_terminal_size().columns, 120))
    named = [
        f"[{f.metadata['metavar'] or name}{' ...' if kinds[name] is tuple else ''}]"
        for name, f in fields.items()
        if f.metadata["positional"]
    ]
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=" ".join(["%(prog)s", *named, "[options]"]),
        description=_fitted(description, width),
        epilog=_fitted(epilog, width),
        allow_abbrev=False,
        add_help=False,
        exit_on_error=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=width),
    )
    titles = [*("arguments" if f.metadata["positional"] else f.metadata["group"] for f in fields.values()), "options"]
    groups = {title: parser.add_argument_group(title) for title in dict.fromkeys(titles)}
    for name, field in fields.items():
        meta = field.metadata
        group = groups["arguments" if meta["positional"] else meta["group"]]
        text = meta["help"].replace("%", "%%")
        shown = meta["shown"] if meta["shown"] is not None else field.default
        if shown is not None and shown is not False and shown not in ("", ()):
            text += f" (default: {'yes' if shown is True else shown})".replace("%", "%%")
        if meta["positional"]:
            many = kinds[name] is tuple
            group.add_argument(name, nargs="*" if many else "?", metavar=meta["metavar"], help=text)
            continue
        if kinds[name] is bool:
            action = argparse.BooleanOptionalAction if field.default is not False else "store_true"
            group.add_argument(flag(name), action=action, help=text)
            if field.default is False and "config" in fields:  # takes back what the file says; not worth a line of help
                parser.add_argument(flag("no_" + name), dest=name, action="store_false", help=argparse.SUPPRESS)
        else:
            metavar = meta["metavar"] or (
                "|".join(meta["choices"]) if meta["choices"] else kinds[name].__name__.upper()
            )
            action = "append" if kinds[name] is tuple else "store"
            group.add_argument(flag(name), action=action, metavar=metavar, help=text)
    groups["options"].add_argument("-h", "--help", action="help", help="show this and leave")
    return parser


def _fitted(text: str, width: int) -> str:
    """`text` with its lines broken to `width`, the rest of a line indented deeper than its beginning."""

    def fit(line: str) -> str:
        indent = " " * (len(line) - len(line.lstrip())) + ("    " if line.startswith(" ") else "")
        return textwrap.fill(line, width, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)

    return "\n".join(fit(line) for line in text.splitlines())
