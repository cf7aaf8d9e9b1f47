"""The command line of a settings class, by argparse: the text of each setting, and what `--help` shows."""

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


def read_arguments(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[dict[str, Any], list[str], list[Wrong]]:
    """(text by setting, unknown arguments, problems); a flag that argparse refuses is a problem."""
    line, problems = list[str](), list[Wrong]()
    for argument in argv:
        name, equals, value = argument.partition("=")
        if line and re.match(r"--[^=]+$", line[-1]) and re.match(r"-(\.?\d|inf|nan)", argument):
            line[-1] += "=" + argument  # argparse takes a number like -1e-5 for an option
        else:
            line.append(name.replace("_", "-") + equals + value if name.startswith("--") else argument)
    while True:
        try:
            namespace, unknown = parser.parse_known_args(line)
            return {name: value for name, value in vars(namespace).items() if value != []}, unknown, problems
        except argparse.ArgumentError as error:
            names = (error.argument_name or "").split("/")
            rule = "takes no value" if "explicit" in str(error.message) else "needs a value"
            problems.append(Wrong(f"{names[0]}: {rule}; see {parser.prog} --help", name_of(names[0])))
            rest = [argument for argument in line if argument.partition("=")[0] not in names]
            if len(rest) == len(line):
                raise UserError(*(wrong.text for wrong in problems)) from None
            line = rest


def make_parser(
    fields: Fields, kinds: dict[str, type], prog: str, description: str, epilog: str
) -> argparse.ArgumentParser:
    """The parser of these settings; all values stay text."""
    width = max(60, min(shutil.get_terminal_size().columns, 120))
    positional = [
        f"[{field.metadata['metavar']}{' ...' if kinds[name] is tuple else ''}]"
        for name, field in fields.items()
        if field.metadata["positional"]
    ]
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=" ".join(["%(prog)s", *positional, "[options]"]),
        description=_wrapped(description, width),
        epilog=_wrapped(epilog, width),
        allow_abbrev=False,
        add_help=False,
        exit_on_error=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=width),
    )
    titles = [*(field.metadata["group"] for field in fields.values()), "options"]
    groups = {title: parser.add_argument_group(title) for title in dict.fromkeys(titles)}
    for name, field in fields.items():
        meta, group, kind = field.metadata, groups[field.metadata["group"]], kinds[name]
        shown = meta["shown"] if meta["shown"] is not None else "yes" if field.default is True else field.default
        default = "" if shown in (None, "", ()) or shown is False else f" (default: {shown})"
        text = (meta["help"] + default).replace("%", "%%")
        metavar = meta["metavar"] or "|".join(meta["choices"]) or ("N" if kind is int else kind.__name__.upper())
        if meta["positional"]:
            group.add_argument(name, nargs="*" if kind is tuple else "?", metavar=metavar, help=text)
        elif kind is not bool:
            group.add_argument(flag(name), action="append" if kind is tuple else "store", metavar=metavar, help=text)
        elif field.default is False:
            group.add_argument(flag(name), action="store_true", help=text)
            if "config" in fields:  # turns off what the file turns on; not worth a line of help
                parser.add_argument(flag("no_" + name), dest=name, action="store_false", help=argparse.SUPPRESS)
        else:
            group.add_argument(flag(name), action=argparse.BooleanOptionalAction, help=text)
    groups["options"].add_argument("-h", "--help", action="help", help="show this help and exit")
    return parser


def _wrapped(text: str, width: int) -> str:
    """`text` with its lines broken to `width`."""
    wrap = textwrap.TextWrapper(width, subsequent_indent="    ", break_on_hyphens=False, break_long_words=False)
    return "\n".join(map(wrap.fill, text.splitlines()))
