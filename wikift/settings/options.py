"""A settings dataclass <-> its command line, its config file and the keywords of a Python call.

A setting is one dataclass field made by `option`. All problems of a command line are collected and reported at once,
with those of the checks that follow. Imports nothing heavy: `--help` is instant.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from wikift.base.command import as_typed
from wikift.base.errors import UserError
from wikift.settings.arguments import Fields, Wrong, flag, make_parser, read_arguments
from wikift.settings.habits import unknown
from wikift.settings.values import convert, kind_of, read_config_file, show

__all__ = ["ROLES", "Parsed", "flag", "names_by_role", "option", "parse", "parse_all"]

Settings = TypeVar("Settings", covariant=True)
Result = TypeVar("Result")

# What a change of a setting means to a run that is resumed: another experiment is refused; another schedule or
# placement is allowed and printed; a view shows or stores the run and changes nothing in it.
ROLES = ("experiment", "schedule", "placement", "view")
_ROLE_OF_GROUP = {
    "model": "experiment", "data": "experiment", "length": "schedule", "optimizer": "schedule", "batch": "placement",
    "speed": "placement",
}  # fmt: skip


_FLAG = re.compile(r"--[a-z0-9-]+")
_MORE = {"choices": (), "shown": None, "role": None, "rule": ">=1", "needs": "", "against": ()}


def option(default: Any, help: str, metavar: str | None = None, *, group: str = "options", **more: Any) -> Any:
    """One setting.

    choices: of a text. rule: of a number, one of values.RULES. role: one of ROLES, else its group's.
    shown: the text of a default that is derived (`None` in the class).
    needs: the setting without which it has no effect. against: settings that it cannot be used with.

    The group "arguments" has no flags: its settings are set by position. A TEXT may be anything: empty, or not UTF-8,
    which a name or a path may not. In a PATH, FILE, DIR, MODEL or RUN a leading `~` is the home folder.
    """
    metadata = {"help": help, "metavar": metavar, "group": group, "positional": group == "arguments", **_MORE, **more}
    assert len(metadata) == 4 + len(_MORE), more
    metadata["role"] = metadata["role"] or _ROLE_OF_GROUP.get(group, "view")
    metadata |= {"prose": metavar == "TEXT", "path": re.search("PATH|FILE|DIR|MODEL|RUN", metavar or "") is not None}
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


def parse(settings_class: type[Settings], argv: Sequence[str]) -> Settings:
    """The settings of a command line without further checks: raises UserError with every problem in it."""
    parsed = parse_all(settings_class, argv)
    parsed.refuse(())
    return parsed.settings


def parse_all(
    settings_class: type[Settings], argv: Sequence[str] = (), *, keywords: Mapping[str, Any] | None = None
) -> Parsed[Settings]:
    """Read `argv` (or a Python call's `keywords`), and the file that `--config` names, which these override.

    Problems are in the result, see `Parsed.refuse`. `--help` prints the class's docstring and its options, and exits
    with 0.
    """
    fields = {f.name: f for f in dataclasses.fields(settings_class) if f.init}  # type: ignore[arg-type]
    kinds = {name: kind_of(hint) for name, hint in typing.get_type_hints(settings_class).items() if name in fields}
    flags = [flag(name) for name, field in fields.items() if not field.metadata["positional"]]
    if {"-h", "--help"} & set(argv):
        about, _, examples = inspect.cleandoc(settings_class.__doc__ or "").partition("\n\n")
        texts = (
            f"wikift {settings_class.__name__.removesuffix('Settings').lower()}",
            " ".join(about.split()),
            examples,
        )
        make_parser(fields, kinds, *map(as_typed, texts)).print_help()
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
        # first, so that the command line wins; a wrong value in the file is told all the same
        raw = [("file", name, value) for name, value in filed.items()] + raw
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for origin, name, value in raw:
        sources[name] = _typed(fields[name], value, origin) + (f" in {typed['config']}" if origin == "file" else "")
        try:
            values[name] = convert(value, kinds[name], fields[name].metadata, origin)
        except ValueError as error:
            problems.append(Wrong(f"{sources[name]}: {error}", name))
    problems = [Wrong(text, "" if setting in values else setting) for text, setting in problems]
    settings = settings_class(**values)
    return Parsed(settings, sources, (*problems, *_clashes(settings, fields, sources, {p.setting for p in problems})))


def _typed(field: dataclasses.Field[Any], value: Any, origin: str) -> str:
    """How a setting was set: `--max-steps 5`, `--no-private`, `seed 1`."""
    if origin == "line" and isinstance(value, bool):
        return flag(field.name if value else f"no_{field.name}")
    name = field.metadata["metavar"] if field.metadata["positional"] else None
    return f"{name or (flag(field.name) if origin == 'line' else field.name)} {show(value)}"


def _clashes(settings: Any, fields: Fields, sources: Mapping[str, str], unread: set[str]) -> Iterator[Wrong]:
    """What has no effect without a setting that is missing, and what cannot be used together."""
    chosen = [name for name in sources if getattr(settings, name) not in (None, fields[name].default)]
    for name in chosen:
        needs, against = fields[name].metadata["needs"], fields[name].metadata["against"]
        if needs and needs not in {*chosen, *unread}:
            yield Wrong(f"{sources[name]}: has no effect without {flag(needs)}; add that, or remove this")
        for other in against:
            both_ways = other in chosen and name in fields[other].metadata["against"]
            if other in chosen and not (both_ways and chosen.index(other) < chosen.index(name)):
                yield Wrong(f"{sources[name]}: cannot be used with {sources[other]}; remove one of the two")


def _filed(path: str, fields: Fields, typed: Mapping[str, Any]) -> tuple[dict[str, Any], list[Wrong]]:
    """(values by setting, problems) of a config file, less what depends on a setting that was typed, or excludes it."""
    known = [name for name in fields if name != "config"]
    switches = {name for name in known if fields[name].default is False}
    try:
        values = read_config_file(Path(path).expanduser())
    except UserError as error:  # any setting may be in it
        return {}, [*map(Wrong, error.problems), *(Wrong("", name) for name in known if name not in typed)]
    flags = [flag(name) for name in known]
    problems = [unknown(key, show(value), flags, f" in {path}") for key, value in values.items() if key not in known]
    depends = {n: {*fields[n].metadata["against"], fields[n].metadata["needs"]} - switches for n in known}
    return {
        name: value for name, value in values.items() if name in known and not depends[name] & typed.keys()
    }, problems
