"""A settings dataclass <-> its command line and config file.

A setting is one dataclass field made by `option`. All problems of a command line are collected and reported at once,
which is why argparse sees strings only and the conversion happens here. Imports nothing heavy: `--help` is instant.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import re
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from wikift.base.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib

Settings = TypeVar("Settings")

# What a change of a setting means to a run that is resumed: another experiment is refused; another schedule or
# placement is allowed and told; a view shows or stores the run and changes nothing in it.
ROLES = ("experiment", "schedule", "placement", "view")
_ROLE_OF_GROUP = {
    "model": "experiment", "data": "experiment", "length": "schedule", "optimizer": "schedule", "batch": "placement",
    "speed": "placement",
}  # fmt: skip


def option(
    default: Any,
    help: str,
    *,
    group: str = "options",
    choices: Sequence[str] = (),
    metavar: str | None = None,
    positional: bool = False,
    shown: str | None = None,
    prose: bool = False,
    role: str | None = None,
) -> Any:
    """One setting. `shown` is what `--help` gives as the default where that is derived (`None` in the class).

    `role` says what a change of it means to a run, see ROLES; its group's role where not given.

    `prose` is text of any kind: it may be empty, or not be UTF-8, which a name or a path may not.
    """
    return dataclasses.field(
        default=default,
        metadata={
            "help": help,
            "group": group,
            "choices": tuple(choices),
            "metavar": metavar,
            "positional": positional,
            "shown": shown,
            "prose": prose,
            "role": role or _ROLE_OF_GROUP.get(group, "view"),
        },
    )


def names_by_role(settings_class: type[Any], role: str) -> list[str]:
    """The settings that have `role`, in the order of their definition."""
    return [field.name for field in dataclasses.fields(settings_class) if field.metadata["role"] == role]


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
    exclusive: Mapping[str, Sequence[str]] | None = None,
    said: dict[str, str] | None = None,
) -> Settings:
    """Read `argv` (and the file that `--config` names, which the command line overrides) into `settings_class`.

    `exclusive` tells for some settings which ones of the config file they displace when given on the command line.
    `said` is filled with how each setting was given: {"max_steps": "--max-steps 5", "seed": "seed 1 in my.toml"}.
    Raises UserError with every problem found; `--help` prints and exits with 0.
    """
    fields = {f.name: f for f in dataclasses.fields(settings_class) if f.init}  # type: ignore[arg-type]
    kinds = {name: _kind(hint) for name, hint in typing.get_type_hints(settings_class).items() if name in fields}
    parser = _parser(fields, kinds, prog, description, epilog)
    given, unknown, problems = _parse_words(parser, _words(argv))
    flags = [flag(name) for name, field in fields.items() if not field.metadata["positional"]]
    typed = {name: value for name, value in vars(given).items() if name in fields and value != []}
    many = next((name for name, kind in kinds.items() if kind is tuple and fields[name].metadata["positional"]), None)
    for before, word in zip(["", *unknown], unknown, strict=False):
        if word.startswith("-"):
            problems.append(_unknown(word, flags, prog))
        elif before.startswith("-") and "=" not in before:
            continue  # the unknown setting's value
        elif many is not None:  # argparse takes only those that stand together
            typed.setdefault(many, []).append(word)
        else:
            problems.append(f"{word}: belongs to no setting; see {prog} --help")
    filed: dict[str, Any] = {}
    if "config" in fields and typed.get("config"):
        try:
            filed = read_config_file(Path(typed["config"]))
        except UserError as error:
            problems += error.problems
        for key in [k for k in filed if k not in fields or k == "config"]:
            problems.append(_unknown(key, [n for n in fields if n != "config"], f"config file {typed['config']}"))
            del filed[key]
        displaced = {other for name in typed for other in (exclusive or {}).get(name, ())}
        filed = {name: value for name, value in filed.items() if name not in displaced}
    values: dict[str, Any] = {}
    for source, raw in (("file", filed), ("line", typed)):
        for name, value in raw.items():
            meta = fields[name].metadata
            label = (meta["metavar"] or name) if meta["positional"] else flag(name) if source == "line" else name
            words = f"{label} {_show(value)}" + ("" if source == "line" else f" in {typed['config']}")
            try:
                values[name] = _convert(value, kinds[name], meta, source)
            except ValueError as error:
                problems.append(f"{words}: {error}")
            if said is not None:
                said[name] = words
    if problems:
        raise UserError(*problems)
    return settings_class(**values)


def read_config_file(path: Path) -> dict[str, Any]:
    """The settings of a TOML or JSON file, `-` in names read as `_`."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows put a mark in front
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: cannot be read ({_reason(error)}); give a TOML or JSON file") from None
    try:
        content = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except ValueError as error:  # JSONDecodeError and TOMLDecodeError alike
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise UserError(f"--config {path}: not valid {kind} ({error}); mend the file or name another") from None
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: holds a {type(content).__name__}, not a table of settings")
    names = [str(key).replace("-", "_") for key in content]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(*(f"{name} in {path}: is there twice, with - and with _; leave one out" for name in twice))
    return dict(zip(names, content.values(), strict=True))


def _words(argv: Sequence[str]) -> list[str]:
    """`--max_steps` -> `--max-steps`; `--dropout -1e-5` joined by `=`, as argparse takes the number for an option."""
    words: list[str] = []
    for word in argv:
        if words and words[-1].startswith("--") and "=" not in words[-1] and re.match(r"-(\.?\d|inf|nan)", word):
            words[-1] += "=" + word
        elif word.startswith("--"):
            name, equals, value = word.partition("=")
            words.append(name.replace("_", "-") + equals + value)
        else:
            words.append(word)
    return words


def _parse_words(parser: argparse.ArgumentParser, words: list[str]) -> tuple[argparse.Namespace, list[str], list[str]]:
    """(given, unknown words, problems): an option that argparse refuses is left out and the rest is read again."""
    problems: list[str] = []
    while True:
        try:
            return (*parser.parse_known_args(words), problems)
        except argparse.ArgumentError as error:
            names = (error.argument_name or "").split("/")
            takes = "takes no value" if "explicit" in str(error.message) else "needs a value"
            problems.append(f"{names[0]}: {takes}; see {parser.prog} --help")
            left = [word for word in words if word.partition("=")[0] not in names]
            if len(left) == len(words):
                raise UserError(*problems) from None
            words = left


def _parser(
    fields: dict[str, dataclasses.Field[Any]], kinds: dict[str, type], prog: str, description: str, epilog: str
) -> argparse.ArgumentParser:
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


def _kind(hint: Any) -> type:
    """`int | None` -> int, `tuple[str, ...]` -> tuple."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = [h for h in typing.get_args(hint) if h is not type(None)]
    return typing.cast(type, typing.get_origin(hint) or hint)


def _convert(value: Any, kind: type, meta: Mapping[str, Any], source: str) -> Any:
    if kind is tuple:
        return tuple(_convert(part, str, meta, source) for part in value)
    if kind is bool:
        if isinstance(value, bool):
            return value
        raise ValueError("must be true or false")
    if isinstance(value, bool):
        raise ValueError(f"must be {_article(kind)}, not true or false")
    if kind is str:
        if not isinstance(value, str):
            raise ValueError("must be text, in quotes")
        if meta["choices"] and value not in meta["choices"]:
            raise ValueError(f"must be one of {', '.join(meta['choices'])}{nearest(value, meta['choices'])}")
        if not meta["prose"] and (not value.strip() or "\0" in value):
            raise ValueError("must not be empty; name something or leave it out")
        if not meta["prose"] and value != value.encode("utf-8", "replace").decode("utf-8"):
            raise ValueError("must be UTF-8 text")
        return value
    if source == "file" and isinstance(value, str):
        raise ValueError(f"must be {_article(kind)}, without quotes")
    try:
        number = kind(value)
    except (TypeError, ValueError, OverflowError):  # int(inf) overflows
        raise ValueError(f"must be {_article(kind)}") from None
    if kind is float and not math.isfinite(number):
        raise ValueError("must be a finite number")
    if kind is int and isinstance(value, float) and value != number:
        raise ValueError("must be a whole number")
    return number


def _article(kind: type) -> str:
    return {int: "a whole number", float: "a number"}[kind]


def _unknown(word: str, known: Sequence[str], where: str) -> str:
    name = word.partition("=")[0]
    return f"{name}: no such setting of {where}{nearest(name, known)}"


def nearest(word: str, known: Sequence[str]) -> str:
    """` (did you mean ...?)` where one of `known` looks like `word`, else nothing."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" (did you mean {near[0]}?)" if near else ""


def _show(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else repr(value) if value == "" else str(value)


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
