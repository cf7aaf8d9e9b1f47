"""The configurations that a dataset's README.md lists in its front matter, as the Hub and `datasets` read them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from wikift.base.errors import UserError, one_line

Patterns = dict[str, list[str]]  # of files, by split
_WORD = re.compile(r"\w[\w.-]{0,99}")


def configs_of(readme: Path) -> dict[str, Patterns]:
    """The patterns of each configuration's files; empty where there is no card, or it lists none."""
    import yaml

    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    front = text.removeprefix("---").partition("\n---")[0] if text.startswith("---") else ""
    try:
        content = yaml.load(front, yaml.BaseLoader)  # texts, lists and objects, nothing else
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{readme}: its front matter cannot be read ({one_line(error)}); correct it") from None
    listed = content.get("configs") if isinstance(content, dict) else None
    configs = [entry for entry in listed or () if isinstance(entry, dict)]
    configs.sort(key=lambda entry: not (entry.get("default") == "true" or entry.get("config_name") == "default"))
    named = {_text(entry.get("config_name")) or "default": p for entry in configs if (p := _patterns(entry))}
    splits = [(split, paths) for patterns in named.values() for split, paths in patterns.items()]
    # a split becomes a file of the store
    problems = [f"split {split!r} must be a word" for split, _ in splits if not _WORD.fullmatch(split)]
    problems += [f"{p!r} leads out of the folder" for _, paths in splits for p in paths if ".." in p.split("/")]
    if problems:
        raise UserError(*(f"{readme}: {problem}; correct it" for problem in dict.fromkeys(problems)))
    return named


def _patterns(entry: dict[str, Any]) -> Patterns:
    """`data_files` is a pattern, a list of them, splits with patterns, or a list of {split, path}."""
    files, folder = entry.get("data_files"), _text(entry.get("data_dir"))
    parts = files if isinstance(files, list) else [files] if files else []
    patterns: Patterns = {}
    for part in parts:
        of_part = part if isinstance(part, dict) else {"split": "train", "path": part}
        splits = {_text(of_part["split"]): of_part.get("path")} if "split" in of_part else of_part
        for split, paths in splits.items():
            named = paths if isinstance(paths, list) else [paths]
            patterns.setdefault(split, []).extend(f"{folder}/{path}".strip("/") for path in map(_text, named) if path)
    return patterns


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def choose(configs: dict[str, Patterns], config: str | None) -> tuple[str, Patterns]:
    """The configuration `config`, or the only or default one. Raises UserError listing all where it is not clear."""
    names = list(configs)
    if config is None and (len(names) == 1 or names[0] == "default"):
        config = names[0]
    if config is None or config not in configs:
        raise UserError(config_problem(config, names))
    return config, configs[config]


def config_problem(config: str | None, names: list[str]) -> str:
    wrong = (
        ": required, the dataset has several" if config is None else f" {config}: the dataset has no such configuration"
    )
    return f"--dataset-config{wrong}; choose one of {', '.join(names)}"
