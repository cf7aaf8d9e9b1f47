"""The two ways a command may fail without being wrong itself.

    Exception
      UserError           a setting or a file of the user's: exit code 2, every problem listed, no traceback
      EnvironmentFault    the machine's (disk full, no network, a lost rank): exit code 1, what to do, no traceback

Everything else that escapes is a fault of wikift's and keeps its traceback.
"""


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
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= length else text[: length - 3] + "..."
