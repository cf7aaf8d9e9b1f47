"""The two ways a command may fail without being wrong itself, and the exit codes.

    Exception
      UserError           a setting or a file of the user's: exit code 2, every problem listed, no traceback
      EnvironmentFault    the machine's (disk full, no network, a lost rank): exit code 1, what to do, no traceback

Everything else that escapes is a fault of wikift's and keeps its traceback.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Sequence

from wikift.base.console import print

EXIT_DONE = 0
EXIT_FAULT = 1
EXIT_USER = 2
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: stopped by a signal, all saved, the same command resumes


class UserError(Exception):
    """Problems in what the user asked for, each one line: setting, value, rule, fix."""

    def __init__(self, *problems: str) -> None:
        assert problems
        super().__init__("\n".join(problems))
        self.problems = problems


class EnvironmentFault(Exception):
    """Something outside wikift failed; the message says what was kept and what to do."""


def one_line(error: BaseException, length: int = 160) -> str:
    """An error's message in one line of at most `length` characters."""
    text = without_password(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= length else text[: length - 3] + "..."


def without_password(text: str) -> str:
    """`text` less the user and password of the addresses in it."""
    return re.sub(r"(?<=://)[^/\s@]*@", "", text)


def report(error: UserError) -> int:
    """Print every problem of the user's; returns the exit code."""
    count = len(error.problems)
    head = "wikift: " + ("one problem" if count == 1 else f"{count} problems")
    print(head, *(f"  {problem}" for problem in error.problems), sep="\n", file=sys.stderr)
    return EXIT_USER


def nearest(word: str, known: Sequence[str]) -> str:
    """` (did you mean ...?)` where one of `known` looks like `word`, else nothing."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" (did you mean {near[0]}?)" if near else ""
