"""A command on a pseudo-terminal, typed at and read from."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import sys
import termios
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GENERATE = [sys.executable, str(ROOT / "launch" / "generate.py")]
SCRIPT = "Hänsch — 東京 🜚 ﷺ…\nend"


class Terminal:
    """A command on a pseudo-terminal."""

    def __init__(self, command: list[str], columns: int = 80, **environment: str) -> None:
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
            os.environ.update({"TERM": "xterm", **environment})
            os.execv(command[0], command)
        self.raw = b""

    def send(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
        """Everything seen up to and with `pattern`; what follows stays for the next time."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern.encode(), self.raw)):
            if select.select([self.descriptor], [], [], 0.2)[0]:
                with contextlib.suppress(OSError):  # the terminal is closed: the child is gone
                    self.raw += os.read(self.descriptor, 65536)
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.raw.decode(errors='replace')!r}"
        before, self.raw = self.raw[: found.end()], self.raw[found.end() :]
        return before.decode()

    def rest(self) -> str:
        """Everything to the end of the command."""
        with contextlib.suppress(OSError):  # the other end is closed
            while data := os.read(self.descriptor, 65536):
                self.raw += data
        return self.raw.decode()

    def exit_code(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
