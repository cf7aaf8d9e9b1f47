"""A settings dataclass <-> its command line, its config file and the keywords of a Python call.

A setting is one dataclass field made by `option`. All problems of a command line are collected and reported at once,
with those of the checks that follow. Imports nothing heavy: `--help` is instant.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from wikift.base.command import as_typed
from wikift.base.errors import UserError
from wikift.settings.arguments import Fields, Wrong, flag, make_parser, read_arguments
from wikift.settings.habits import unknown
from wikift.settings.values import convert, kind_of, read_config_file, show

__all__ = ["ROLES", "Parsed", "flag", "names_by_role", "option", "parse", "parse_all"]

Settings = TypeVar("Settings")
Result = TypeVar("Result")

# What a change of a setting means to a run that is resumed: another experiment is refused; another schedule or
# placement is allowed and printed; a view shows or stores the run and changes nothing in it.
ROLES = ("experiment", "schedule", "placement", "view")
_ROLE_OF_GROUP = {
    "model": "experiment", "data": "experiment", "length": "schedule", "optimizer": "schedule", "batch": "placement",
    "speed": "placement",
}  # fmt: skip


_FLAG = re.compile(r"--[a-z0-9-]+")


def option(
    default: Any,
    help: str,
    metavar: str | None = None,
    *,
    group: str = "options",
    choices: Sequence[str] = (),
    shown: str | None = None,
    role: str | None = None,
) -> Any:
    """One setting. `shown` is the text of a default that is derived (`None` in the class); `role` is one of ROLES.

    The group "arguments" has no flags: its settings are set by position. A TEXT may be anything: empty, or not UTF-8,
    which a name or a path may not. In a PATH, FILE, DIR, MODEL or RUN a leading `~` is the home folder.
    """
    metadata = {
        "help": help, "metavar": metavar, "group": group, "choices": tuple(choices), "shown": shown,
        "role": role or _ROLE_OF_GROUP.get(group, "view"), "positional": group == "arguments",
        "prose": metavar == "TEXT", "path": re.search("PATH|FILE|DIR|MODEL|RUN", metavar or "") is not None,
    }  # fmt: skip
    return dataclasses.field(default=default, metadata=metadata)


def names_by_role(settings_class: type[Any], role: str) -> list[str]:
    """The settings that have `role`, in the order of their definition."""
    return [field.name for field in dataclasses.fields(settings_class) if field.metadata["role"] == role]


@dataclass(frozen=True)
class Parsed(Generic[Settings]):
    """A command line as far as it could be read: where a value is wrong, its setting has the default.

    `typed` tells how each setting was set: {"max_steps": "--max-steps 5", "seed": "seed 1 in my.toml"}.
    """

    settings: Settings
    typed: dict[str, str]
    problems: tuple[Wrong, ...] = ()

    def checked(self, check: Callable[[Settings], Result]) -> Result:
        """What `check` returns of the settings. Raises UserError with its problems and the command line's."""
        try:
            result = check(self.settings)
        except UserError as error:
            self.refuse(error.problems)
            raise
        self.refuse(())
        return result

    def refuse(self, further: Iterable[str]) -> None:
        """Raise UserError with all problems: those of the command line, and `further` ones by checks of its settings.

        A check saw the default of a setting that could not be read: its problems that name that setting are omitted.
        """
        unread = {flag(wrong.setting) for wrong in self.problems if wrong.setting}
        problems = [wrong.text for wrong in self.problems if wrong.text]
        problems += [text for text in further if not unread & set(_FLAG.findall(text.partition(";")[0]))]
        if problems:
            raise UserError(*dict.fromkeys(problems))


def parse(settings_class: type[Settings], argv: Sequence[str], **about: Any) -> Settings:
    """The settings of a command line without further checks: raises UserError with every problem in it."""
    parsed = parse_all(settings_class, argv, **about)
    parsed.refuse(())
    return parsed.settings


def parse_all(
    settings_class: type[Settings],
    argv: Sequence[str] = (),
    *,
    prog: str,
    description: str = "",
    epilog: str = "",
    exclusive: Mapping[str, Sequence[str]] | None = None,
    keywords: Mapping[str, Any] | None = None,
) -> Parsed[Settings]:
    """Read `argv` (or a Python call's `keywords`), and the file that `--config` names, which these override.

    `exclusive` tells for some settings which ones of the config file they override when set on the command line.
    Problems are in the result, see `Parsed.refuse`; `--help` prints and exits with 0.
    """
    fields = {f.name: f for f in dataclasses.fields(settings_class) if f.init}  # type: ignore[arg-type]
    kinds = {name: kind_of(hint) for name, hint in typing.get_type_hints(settings_class).items() if name in fields}
    flags = [flag(name) for name, field in fields.items() if not field.metadata["positional"]]
    if {"-h", "--help"} & set(argv):
        make_parser(fields, kinds, *map(as_typed, (prog, description, epilog))).print_help()
        raise SystemExit(0)
    problems = list[Wrong]()
    if keywords is None:
        source = "line"
        typed, problems = read_arguments(argv, fields, kinds, lambda name, value: unknown(name, value, flags))
    else:
        source, typed = "call", {k: value for k, value in keywords.items() if k in fields and value is not None}
        problems += [unknown(name, show(keywords[name]), flags) for name in keywords if name not in fields]
    raw = [(source, name, value) for name, value in typed.items()]
    if typed.get("config"):
        filed, wrong = _filed(str(typed["config"]), fields, typed)
        problems += wrong
        overridden = {other for name in typed for other in (exclusive or {}).get(name, ())}
        # first, so that the command line wins; a wrong value in the file is told all the same
        raw = [("file", name, value) for name, value in filed.items() if name not in overridden] + raw
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for origin, name, value in raw:
        meta = fields[name].metadata
        label = (meta["metavar"] or name) if meta["positional"] else flag(name) if origin == "line" else name
        sources[name] = f"{label} {show(value)}" + (f" in {typed['config']}" if origin == "file" else "")
        try:
            values[name] = convert(value, kinds[name], meta, origin)
        except ValueError as error:
            problems.append(Wrong(f"{sources[name]}: {error}", name))
    problems = [Wrong(text, "" if setting in values else setting) for text, setting in problems]
    return Parsed(settings_class(**values), sources, tuple(problems))


def _filed(path: str, fields: Fields, typed: Mapping[str, Any]) -> tuple[dict[str, Any], list[Wrong]]:
    """(values by setting, problems) of a config file."""
    known = [name for name in fields if name != "config"]
    try:
        values = read_config_file(Path(path).expanduser())
    except UserError as error:  # any setting may be in it
        return {}, [*map(Wrong, error.problems), *(Wrong("", name) for name in known if name not in typed)]
    flags = [flag(name) for name in known]
    problems = [unknown(key, show(value), flags, f" in {path}") for key, value in values.items() if key not in known]
    return {name: value for name, value in values.items() if name in known}, problems
