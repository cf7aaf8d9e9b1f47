"""The form in which the user typed a command: what wikift prints can be typed as it stands.

`wikift train`, `python -m wikift train` and `python launch/train.py` are the same program.
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

_LAUNCH = Path(__file__).resolve().parents[2] / "launch"  # of a checkout
_COMMAND = re.compile(r"(-m )?\bwikift (prepare|train|plan|consolidate|evaluate|generate|report|compare|runs|log)\b")


def command_line(name: str) -> str:
    """How the command `name` is typed: `wikift NAME`, `python -m wikift NAME` or `python launch/NAME.py`."""
    return as_typed(f"wikift {name}")


def program_of(name: str) -> list[str]:
    """The words that start the command `name` in a process of its own, which speaks in the same form."""
    program, *arguments = shlex.split(command_line(name))
    if program == "python":
        return [sys.executable, *arguments]
    if Path(sys.argv[0]).stem == "wikift":
        return [sys.argv[0], name]
    script = _LAUNCH / f"{name}.py"  # called from Python: by all means the same wikift
    return [sys.executable, str(script)] if script.exists() else [sys.executable, "-m", "wikift", name]


def as_typed(text: str) -> str:
    """`text` with each `wikift COMMAND` in it, and `torchrun -m wikift COMMAND`, in the form that the user typed."""
    program = Path(sys.argv[0])
    in_checkout = program.resolve().parent == _LAUNCH
    as_module = program.name == "__main__.py" and program.resolve().parent.name == "wikift"

    def typed(match: re.Match[str]) -> str:
        launcher, name = match.groups()
        if in_checkout and (_LAUNCH / f"{name}.py").exists():
            script = shlex.quote(str(program.with_name(f"{name}.py")))
            return script if launcher else f"python {script}"
        return f"python -m wikift {name}" if (in_checkout or as_module) and not launcher else match[0]

    return _COMMAND.sub(typed, text)
