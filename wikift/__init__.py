"""wikift: GPT-2 and WikiText, from raw text to a fine-tuned model that writes text.

    >>> import wikift
    >>> print(wikift.plan(model="distilgpt2", max_steps=100).splitlines()[0])
    # one process: falling back to wikitext-2-v1 (torchrun starts several, and wikitext-103-v1)

Each command is a function here: prepare, train, plan, consolidate, evaluate, generate, with the settings' names as
keywords. Nothing heavy is imported before the first call.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wikift.api import (
        EnvironmentFault,
        TrainResult,
        UserError,
        consolidate,
        evaluate,
        generate,
        plan,
        prepare,
        train,
    )

__version__ = "0.2.0"
__all__ = [
    "EnvironmentFault",
    "TrainResult",
    "UserError",
    "__version__",
    "consolidate",
    "evaluate",
    "generate",
    "plan",
    "prepare",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'wikift' has no attribute {name!r}")
    return getattr(importlib.import_module("wikift.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _refuse_module() -> None:
    """`python -m wikift.MODULE` would import the module and do nothing, with exit code 0."""
    if sys.argv[:1] == ["-m"] and "-m" in sys.orig_argv:  # Python is looking for the module that it was told to run
        module = sys.orig_argv[sys.orig_argv.index("-m") + 1]
        if module.startswith("wikift.") and module != "wikift.__main__":
            print(f"wikift: {module} is no program; use python -m wikift COMMAND", file=sys.stderr)
            raise SystemExit(2)


_refuse_module()
