"""The command line of a settings class: how it is read, and what `--help` shows of it (by argparse)."""

from __future__ import annotations

import argparse
import dataclasses
import re
import shutil
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

Fields = dict[str, dataclasses.Field[Any]]
# Neither a number like -1e-5 nor a text with spaces is an option.
_OPTION = re.compile(r"(--|-(?!inf|nan)[A-Za-z])[^\s=]*(=.*)?", re.DOTALL)


class Wrong(NamedTuple):
    """One problem of a command line, and the setting that it leaves without its value; either may be empty."""

    text: str
    setting: str = ""


def flag(name: str) -> str:
    """The spelling of a setting on the command line: `max_steps` -> `--max-steps`."""
    return "--" + name.replace("_", "-")


def read_arguments(
    argv: Sequence[str], fields: Fields, kinds: dict[str, type], unknown: Callable[[str, str], Wrong]
) -> tuple[dict[str, Any], list[Wrong]]:
    """(values as text by setting, problems); `unknown(name, value)` is the problem of an option that there is not.

    `--name value` and `--name=value` are the same, as are `-` and `_` in names.
    """
    optional = {flag(name): name for name, field in fields.items() if not field.metadata["positional"]}
    optional |= {flag("no_" + name): name for name in optional.values() if kinds[name] is bool}
    typed: dict[str, list[Any]] = {}
    problems, arguments, rest = list[Wrong](), list[str](), [*reversed(argv)]
    while rest:
        argument = rest.pop()
        if not _OPTION.fullmatch(argument):
            arguments.append(argument)
            continue
        spelled, equals, value = argument.partition("=")
        name = spelled.replace("_", "-")
        setting, has_value = optional.get(name, ""), equals or (rest and not _OPTION.fullmatch(rest[-1]))
        if setting and kinds[setting] is bool:
            if equals or (has_value and rest[-1].lower() in ("true", "false")):
                value = value or rest.pop()
                problems.append(
                    Wrong(f"{name} {value}: takes no value; write {flag(setting)} or {flag('no_' + setting)}", setting)
                )
            typed.setdefault(setting, []).append(name == flag(setting))
            continue
        value = value if equals or not has_value else rest.pop()
        if not setting:
            problems.append(unknown(spelled, value))
        elif has_value:
            typed.setdefault(setting, []).append(value)
        else:
            problems.append(Wrong(f"{name}: needs a value", setting))
    for name in (name for name, field in fields.items() if field.metadata["positional"] and arguments):
        typed[name] = arguments if kinds[name] is tuple else arguments[:1]
        arguments = arguments[len(typed[name]) :]
    fix = "write --NAME VALUE, see --help"
    problems += [Wrong(f"{argument}: is not an option, and none takes it; {fix}") for argument in arguments]
    several = {name: values for name, values in typed.items() if len(values) > 1 and kinds[name] is not tuple}
    problems += [
        Wrong(f"{flag(name)}: is set {len(values)} times ({', '.join(map(str, values))}); keep one", name)
        for name, values in several.items()
    ]
    return {name: v if kinds[name] is tuple else v[-1] for name, v in typed.items() if name not in several}, problems


def make_parser(
    fields: Fields, kinds: dict[str, type], prog: str, description: str, epilog: str
) -> argparse.ArgumentParser:
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
        add_help=False,
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
            group.add_argument(flag(name), metavar=metavar, help=text)
        elif field.default is False:
            group.add_argument(flag(name), action="store_true", help=text)
        else:
            group.add_argument(flag(name), action=argparse.BooleanOptionalAction, help=text)
    groups["options"].add_argument("-h", "--help", action="help", help="show this help and exit")
    return parser


def _wrapped(text: str, width: int) -> str:
    """Each line by itself, an example's rest further in."""
    wrap = partial(textwrap.fill, width=width, break_on_hyphens=False, break_long_words=False)
    return "\n".join(wrap(line, subsequent_indent="    " * line.startswith(" ")) for line in text.splitlines())
