"""A settings dataclass <-> its command line and config file, and the exit codes of every command.

A setting is one dataclass field made by `option`. All problems of a command line are collected and reported at once,
which is why argparse sees strings only and the conversion happens here. Imports nothing heavy: `--help` is instant.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
import shutil
import sys
import time
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from wikift.errors import EnvironmentFault, UserError

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib

EXIT_DONE = 0
EXIT_FAULT = 1
EXIT_USER = 2
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: stopped by a signal, all saved, "try again" goes on

Settings = TypeVar("Settings")


def option(
    default: Any,
    help: str,
    *,
    group: str = "options",
    choices: Sequence[str] = (),
    metavar: str | None = None,
    positional: bool = False,
    shown: str | None = None,
) -> Any:
    """One setting. `shown` is what `--help` gives as the default where that is derived (`None` in the class)."""
    return dataclasses.field(
        default=default,
        metadata={
            "help": help,
            "group": group,
            "choices": tuple(choices),
            "metavar": metavar,
            "positional": positional,
            "shown": shown,
        },
    )


def flag(name: str) -> str:
    """The spelling of a setting on the command line: `max_steps` -> `--max-steps`."""
    return "--" + name.replace("_", "-")


def parse(
    settings_class: type[Settings],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    epilog: str = "",
    exclusive: Sequence[tuple[str, ...]] = (),
) -> Settings:
    """Read `argv` (and the file that `--config` names, which the command line overrides) into `settings_class`.

    `exclusive` names groups of settings that answer one question: given on the command line, one displaces the others
    in the config file. Raises UserError with every problem found; `--help` prints and exits with 0.
    """
    fields = {f.name: f for f in dataclasses.fields(settings_class) if f.init}  # type: ignore[arg-type]
    kinds = {name: _kind(hint) for name, hint in typing.get_type_hints(settings_class).items() if name in fields}
    parser = _parser(fields, kinds, prog, description, epilog)
    problems: list[str] = []
    try:
        given, unknown = parser.parse_known_args([_dashes(a) for a in argv])
    except argparse.ArgumentError as error:
        raise UserError(f"{error.argument_name}: {error.message}; see {prog} --help") from None
    for word in unknown:
        problems.append(_unknown(word, [flag(n) for n in fields if not fields[n].metadata["positional"]], prog))
    typed = {name: value for name, value in vars(given).items() if name in fields}
    typed = {name: list(value) if isinstance(value, list) else value for name, value in typed.items() if value != []}
    filed: dict[str, Any] = {}
    if "config" in fields and typed.get("config"):
        try:
            filed = read_config_file(Path(typed["config"]))
        except UserError as error:
            raise UserError(*problems, *error.problems) from None
        for key in [k for k in filed if k not in fields or k == "config"]:
            problems.append(_unknown(key, [n for n in fields if n != "config"], f"config file {typed['config']}"))
            del filed[key]
        for group in exclusive:
            if any(name in typed for name in group):
                filed = {name: value for name, value in filed.items() if name not in group}
    values: dict[str, Any] = {}
    for source, raw in (("file", filed), ("line", typed)):
        for name, value in raw.items():
            label = flag(name) if source == "line" else f"{name} in {typed['config']}"
            if fields[name].metadata["positional"]:
                label = (fields[name].metadata["metavar"] or name).rstrip(".")
            try:
                values[name] = _convert(value, kinds[name], fields[name].metadata["choices"], source)
            except ValueError as error:
                problems.append(f"{label} {_show(value)}: {error}")
    if problems:
        raise UserError(*problems)
    return settings_class(**values)


def read_config_file(path: Path) -> dict[str, Any]:
    """The settings of a TOML or JSON file, `-` in names read as `_`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: cannot be read ({_reason(error)}); give a TOML or JSON file") from None
    try:
        content = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except ValueError as error:  # JSONDecodeError and TOMLDecodeError alike
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise UserError(f"--config {path}: not valid {kind} ({error}); mend the file or name another") from None
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: holds a {type(content).__name__}, not a table of settings")
    return {str(key).replace("-", "_"): value for key, value in content.items()}


def run(command: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> typing.NoReturn:
    """Run one command to its exit code, printing the two kinds of expected failure without a traceback."""
    first = os.environ.get("RANK", "0") == "0"
    try:
        code = command(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except UserError as error:
        if not first:
            time.sleep(2)  # torchrun ends every rank when the first one leaves: let rank 0 speak before
            sys.exit(EXIT_USER)
        count = len(error.problems)
        head = "wikift: " + ("one problem" if count == 1 else f"{count} problems")
        print(head, *(f"  {problem}" for problem in error.problems), sep="\n", file=sys.stderr)
        code = EXIT_USER
    except EnvironmentFault as error:
        print(f"wikift: {error}", file=sys.stderr)
        code = EXIT_FAULT
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_FAULT
    except KeyboardInterrupt:
        print("wikift: interrupted", file=sys.stderr)
        code = 130
    if "RANK" in os.environ:  # a process group's destructors may never end: see world.stop_world
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


class _Parser(argparse.ArgumentParser):
    """argparse without its own exit: what it cannot take becomes one UserError."""

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _parser(
    fields: dict[str, dataclasses.Field[Any]], kinds: dict[str, type], prog: str, description: str, epilog: str
) -> argparse.ArgumentParser:
    width = max(60, min(shutil.get_terminal_size().columns, 120))
    parser = _Parser(
        prog=prog,
        description=description,
        epilog=epilog,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=width),
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name, field in fields.items():
        meta = field.metadata
        group = (
            groups.setdefault(meta["group"], parser.add_argument_group(meta["group"]))
            if (meta["group"] not in groups)
            else groups[meta["group"]]
        )
        text = meta["help"].replace("%", "%%")
        if meta["positional"]:
            many = kinds[name] is tuple
            group.add_argument(
                name, nargs="*" if many else "?", metavar=meta["metavar"], help=text, default=argparse.SUPPRESS
            )
            continue
        shown = meta["shown"] if meta["shown"] is not None else field.default
        if shown not in (None, "", False, ()):
            text += f" (default: {shown})".replace("%", "%%")
        if kinds[name] is bool:
            action = argparse.BooleanOptionalAction if field.default is not False else "store_true"
            group.add_argument(flag(name), action=action, default=argparse.SUPPRESS, help=text)
        else:
            metavar = meta["metavar"] or (
                "|".join(meta["choices"]) if meta["choices"] else kinds[name].__name__.upper()
            )
            group.add_argument(flag(name), metavar=metavar, default=argparse.SUPPRESS, help=text)
    return parser


def _kind(hint: Any) -> type:
    """`int | None` -> int, `tuple[str, ...]` -> tuple."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = [h for h in typing.get_args(hint) if h is not type(None)]
    return typing.cast(type, typing.get_origin(hint) or hint)


def _convert(value: Any, kind: type, choices: Sequence[str], source: str) -> Any:
    if kind is tuple:
        return tuple(value)
    if kind is bool:
        if isinstance(value, bool):
            return value
        raise ValueError("must be true or false")
    if isinstance(value, bool):
        raise ValueError(f"must be {_article(kind)}, not true or false")
    if kind is str:
        if not isinstance(value, str):
            raise ValueError("must be text, in quotes")
        if choices and value not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}{_nearest(value, choices)}")
        return value
    if source == "file" and isinstance(value, str):
        raise ValueError(f"must be {_article(kind)}, without quotes")
    try:
        number = kind(value)
    except (TypeError, ValueError):
        raise ValueError(f"must be {_article(kind)}") from None
    if number != number or number in (float("inf"), float("-inf")):
        raise ValueError("must be a finite number")
    if kind is int and isinstance(value, float) and value != number:
        raise ValueError("must be a whole number")
    return number


def _article(kind: type) -> str:
    return {int: "a whole number", float: "a number"}[kind]


def _dashes(argument: str) -> str:
    """`--max_steps=5` -> `--max-steps=5`; values and everything without `--` stay as they are."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def _unknown(word: str, known: Sequence[str], where: str) -> str:
    name = word.partition("=")[0]
    return f"{name}: no such setting of {where}{_nearest(name, known)}"


def _nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" (did you mean {near[0]}?)" if near else ""


def _show(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else repr(value) if value == "" else str(value)


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
