"""The rules of import between the wings, and the budgets in lines, as DESIGN states them in CONTRIBUTING.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "wikift"
MODULES = sorted(PACKAGE.rglob("*.py"))
WINGS = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}

# What each wing may import: a wing, or one module of it. Lazy imports count; those for type checking alone do not.
MAY_IMPORT = {
    "commands": WINGS,
    "training": {"engines", "evaluation.score", "generation.live", "data.store", "data.batches", "checkpoint", "model",
                 "settings.run_plan", "watch", "base"},
    "export": {"checkpoint", "base"},
    "evaluation": {"model", "data", "kernels", "base"},
    "generation": {"model", "data", "kernels", "base"},
    "engines": {"model", "kernels", "checkpoint.fragment", "base"},
    "model": {"kernels", "base"},
    "watch": {"base"},
    "data": {"base"},
    "checkpoint": {"base"},
    "settings": {"base"},
    "kernels": set[str](),
    "base": set[str](),
}  # fmt: skip
LIBRARY_HOMES = {
    "deepspeed": {"engines.zero"},
    "wandb": {"watch"},
    "torch.utils.tensorboard": {"watch"},
    "rich.live": {"watch"},
    "gigatoken": {"data.fast_encode"},
    "pyarrow": {"data"},
    "tokenizers": {"data"},
    "argparse": {"settings.arguments"},
}
# No torch behind these, whatever they import, unless a function asks for it.
WITHOUT_TORCH = ("commands", "settings", "base", "data.store", "checkpoint.reader", "export")
HAS_TORCH = ("base.world", "base.failure")  # who am I among the ranks, and how one that fails ends all

MOST_LINES = {"package": 10_000, "core": 2_000, "file": 280, "function": 60, "parameters": 7}
CORE = ("training/run", "training/loop", "engines/base", "engines/single", "engines/optim", "model/gpt2", "data/store",
        "data/batches", "checkpoint/")  # fmt: skip

# Today's breaches: these lists only shrink.
IMPORT_BREACHES: set[str] = set()
BUDGET_BREACHES: set[str] = {"package: too long"}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(imported module, whether when the file is imported), type checking's left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    skipped = {inner for node in typing_only for part in node.body for inner in ast.walk(part)}
    lazy = {i for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) for part in n.body for i in ast.walk(part)}
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node not in lazy
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node not in lazy


def own(name: str) -> str | None:
    """The module of wikift, WING.MODULE, that an import of `name` reads; None for others."""
    parts = name.split(".")
    if parts[0] != "wikift" or len(parts) < 2:
        return None
    return ".".join(parts[1:3]) if parts[1] in WINGS else parts[1]


def within(name: str, allowed: set[str]) -> bool:
    return any(name == place or name.startswith(place + ".") for place in allowed)


def import_breaches() -> set[str]:
    found = set()
    for path in MODULES:
        here = name_of(path)
        wing = here.partition(".")[0]
        for name, _ in imports(path):
            target = own(name)
            allowed = {wing, "__version__", *MAY_IMPORT.get(wing, ())}
            if target is not None and wing in MAY_IMPORT and not within(target, allowed):
                found.add(f"{here} imports {target}")
            for library, homes in LIBRARY_HOMES.items():
                if within(name, {library}) and not within(here, homes):
                    found.add(f"{here} imports {library}")
    return found


def test_messages_are_printed_without_control_characters() -> None:
    """By base.console's print. Generated text is as the model wrote it where it does not go to a terminal."""
    for path in MODULES:
        prints = any(isinstance(n, ast.Name) and n.id == "print" for n in ast.walk(ast.parse(path.read_text())))
        if prints and name_of(path) not in ("__init__", "base.console", "commands.answers"):
            line = r"from wikift\.base\.console import .*\bprint\b"
            assert re.search(line, path.read_text()), f"{name_of(path)}: from wikift.base.console import print"


def torch_breaches() -> set[str]:
    """Modules that load torch, or transformers, when they are imported, through whatever they import."""
    loads: dict[str, set[str]] = {
        name_of(path): {own(n) or n.partition(".")[0] for n, at_once in imports(path) if at_once} for path in MODULES
    }
    heavy = {name for name, targets in loads.items() if targets & {"torch", "transformers", "deepspeed"}}
    while more := {name for name, targets in loads.items() if targets & heavy} - heavy:
        heavy |= more
    return {
        f"{name} loads torch" for name in heavy if within(name, set(WITHOUT_TORCH)) and not within(name, set(HAS_TORCH))
    }


def circles() -> set[str]:
    arrows: dict[str, set[str]] = {}
    for path in MODULES:
        targets = {target for name, _ in imports(path) if (target := own(name)) is not None}
        arrows[name_of(path)] = targets - {name_of(path)}
    reached = dict(arrows)
    while True:
        wider = {name: targets.union(*(reached.get(t, set()) for t in targets)) for name, targets in reached.items()}
        if wider == reached:
            return {f"{name} imports itself in a circle" for name, targets in reached.items() if name in targets}
        reached = wider


def budget_breaches() -> set[str]:
    found, total, core = set(), 0, 0
    for path in MODULES:
        name, text = str(path.relative_to(PACKAGE).with_suffix("")), path.read_text(encoding="utf-8")
        lines = text.count("\n")
        total += lines
        core += lines if name.startswith(CORE) else 0
        if lines > MOST_LINES["file"]:
            found.add(f"{name}: too long")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                count = len([a for a in arguments if a.arg not in ("self", "cls")])
                if (node.end_lineno or 0) - node.lineno + 1 > MOST_LINES["function"]:
                    found.add(f"{name}: {node.name} is too long")
                if count > MOST_LINES["parameters"]:
                    found.add(f"{name}: {node.name} has too many parameters")
    if total > MOST_LINES["package"]:
        found.add("package: too long")
    if core > MOST_LINES["core"]:
        found.add("core: too long")
    return found


@pytest.mark.parametrize(
    ("found", "known"),
    [(import_breaches() | torch_breaches() | circles(), IMPORT_BREACHES), (budget_breaches(), BUDGET_BREACHES)],
    ids=["imports", "budgets"],
)
def test_no_new_breach_and_no_mended_one_listed(found: set[str], known: set[str]) -> None:
    assert sorted(found - known) == [], "new breaches"
    assert sorted(known - found) == [], "fixed: take these out of the list"


def test_settings_are_named_in_few_signatures() -> None:
    """A settings class outside commands/ and settings/ ties the inside to the command line."""
    found = [
        f"{name_of(path)}: {match}"
        for path in MODULES
        if name_of(path).partition(".")[0] not in ("commands", "settings")
        for match in re.findall(r"\bsettings: \w*Settings\b", path.read_text(encoding="utf-8"))
    ]
    assert len(found) <= MOST_SIGNATURES, found


MOST_SIGNATURES = 8


# A variable says what it holds.
VAGUE_NAMES = {"place", "words", "found", "there", "whole", "said", "given"}


def test_no_variable_has_a_vague_name() -> None:
    named = []
    for path in MODULES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        fields = {
            f.target
            for c in ast.walk(tree)
            if isinstance(c, ast.ClassDef)
            for f in c.body
            if isinstance(f, ast.AnnAssign)
        }  # a count of words is called words
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node not in fields:
                named.append((name_of(path), node.id))
            if isinstance(node, ast.arg):
                named.append((name_of(path), node.arg))
    assert [f"{module}: {name}" for module, name in named if name in VAGUE_NAMES] == []
