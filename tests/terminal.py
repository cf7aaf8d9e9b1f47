"""A command on a pseudo-terminal, typed at and read from."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pexpect

ROOT = Path(__file__).resolve().parent.parent
GENERATE = [sys.executable, str(ROOT / "launch" / "generate.py")]
SCRIPT = "Hänsch — 東京 🜚 ﷺ…\nend"


class Terminal:
    """A command on a pseudo-terminal."""

    def __init__(self, command: list[str], columns: int = 80, **environment: str) -> None:
        variables = {**os.environ, "TERM": "xterm", **environment}
        self.child = pexpect.spawn(command[0], command[1:], 60, dimensions=(24, columns), env=variables)
        self.send = self.child.send

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
        """Everything seen up to and with `pattern`; what follows stays for the next time."""
        self.child.expect(pattern, seconds)
        return str((self.child.before + self.child.after).decode())

    def rest(self) -> str:
        """Everything to the end of the command."""
        return str(self.child.read().decode())

    def exit_code(self) -> int:
        self.child.expect(pexpect.EOF)
        self.child.close()
        return int(self.child.exitstatus)
