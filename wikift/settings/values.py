"""One value of the command line, of a config file or of a Python call, brought to its setting's type."""

from __future__ import annotations

import json
import math
import os
import sys
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from wikift.base.errors import UserError, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib

RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {  # of numbers: in the words of a message, and itself
    ">=1": ("1 or more", lambda value: value >= 1),
    ">=0": ("0 or more", lambda value: value >= 0),
    ">0": ("above 0", lambda value: value > 0),
    "(0,1]": ("above 0 and at most 1", lambda value: 0 < value <= 1),
    "(0,1)": ("above 0 and below 1", lambda value: 0 < value < 1),
    "[0,1)": ("at least 0 and below 1", lambda value: 0 <= value < 1),
    "(0,1e6]": ("above 0 and at most a million", lambda value: 0 < value <= 1e6),
    "[0.1,10]": ("from 0.1 to 10; 1 is none", lambda value: 0.1 <= value <= 10),
    "steps": ("a whole number, or a fraction below 1", lambda value: value >= 0 and (value < 1 or value % 1 == 0)),
    "any": ("", lambda value: True),
}


def kind_of(hint: Any) -> type:
    """`int | None` -> int, `tuple[str, ...]` -> tuple."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = [h for h in typing.get_args(hint) if h is not type(None)]
    return typing.cast(type, typing.get_origin(hint) or hint)


def read_config_file(path: Path) -> dict[str, Any]:
    """The settings of a TOML or JSON file, `-` in names read as `_`."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows put a mark in front
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"--config {path}: cannot be read ({reason}); give a TOML or JSON file") from None
    try:
        content = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and TOMLDecodeError alike
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise UserError(f"--config {path}: not valid {kind} ({error}); fix the file or name another") from None
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: holds a {type(content).__name__}, not a table of settings")
    names = [str(key).replace("-", "_") for key in content]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(*(f"{name} in {path}: is set twice, with - and with _; remove one" for name in twice))
    return dict(zip(names, content.values(), strict=True))


def convert(value: Any, kind: type, meta: Mapping[str, Any], source: str) -> Any:
    """`value` as a setting of `kind` takes it; only the command line (`source` "line") writes numbers as text.

    Raises ValueError with the rule that is broken.
    """
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if kind is tuple:
        value = value if isinstance(value, (list, tuple)) else [value]
        return tuple(convert(part, str, meta, source) for part in value)
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
            raise ValueError("must not be empty; name something or omit it")
        if not meta["prose"] and value != value.encode("utf-8", "replace").decode("utf-8"):
            raise ValueError("must be UTF-8 text")
        if not meta["prose"] and max(len(part.encode()) for part in value.split("/")) > 255:
            raise ValueError("is longer than a file's name can be, 255 bytes; shorten it")
        return os.path.expanduser(value) if meta.get("path") else value
    if source != "line" and isinstance(value, str):
        raise ValueError(f"must be {_article(kind)}, without quotes")
    try:
        number = kind(value)
    except (TypeError, ValueError, OverflowError):  # int(inf) overflows
        raise ValueError(f"must be {_article(kind)}") from None
    if kind is float and not math.isfinite(number):
        raise ValueError("must be a finite number")
    if kind is int and isinstance(value, float) and value != number:
        raise ValueError("must be a whole number")
    if kind is int and abs(number) >= 1 << 63:
        raise ValueError("must be a whole number of at most 64 bits")
    rule, holds = RULES[meta.get("rule", "any")]
    if not holds(number):
        raise ValueError(f"must be {rule}")
    return number


def _article(kind: type) -> str:
    return {int: "a whole number", float: "a number", str: "text"}[kind]


def show(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else repr(value) if value == "" else str(value)
