"""The interactive session of `wikift generate`: one prompt per line, commands begin with `/`.

In a pipe each line that is not blank is a prompt or a command, too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wikift.base.console import print
from wikift.base.errors import EXIT_DONE, UserError
from wikift.commands.answers import print_answer, speed
from wikift.generation import prompts
from wikift.settings.checks import SAMPLING, check_sampling, with_defaults
from wikift.settings.options import flag, parse
from wikift.settings.run_fields import GenerateSettings

if TYPE_CHECKING:
    from wikift.generation.writer import Writer

Say = Callable[[str], None]
_HELP = """TEXT             continue this text
/set NAME VALUE  change a setting; without a value, back to its default
/show            the settings and their values
/help            this list
exit, Ctrl-D     quit; /quit too
Ctrl-C           stop the text"""


def converse(writer: Writer, settings: GenerateSettings, source: str, say: Say) -> int:
    """Answer line after line until the input ends; returns the exit code."""
    terminal = sys.stdin is not None and sys.stdin.isatty()
    session = _Session(writer, settings, source, say, terminal)
    if not terminal:
        any(session.execute(line.rstrip("\r\n")) for line in sys.stdin or ())
        return EXIT_DONE
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # `input` edits and remembers lines then
    say("/help lists the commands, Ctrl-D quits")
    while True:
        try:
            # a file gets answers only
            if session.execute(input("> " if sys.stdout.isatty() else "")):
                return EXIT_DONE
        except EOFError:
            print()
            return EXIT_DONE
        except KeyboardInterrupt:  # drops the line begun
            print("\n/quit or Ctrl-D quits", file=sys.stderr)


@dataclass
class _Session:
    writer: Writer
    settings: GenerateSettings
    source: str
    say: Say
    terminal: bool
    number: int = 0  # of the next answer under this seed

    def execute(self, line: str) -> bool:
        """Answer a prompt or execute a command; returns whether it was the last line."""
        name, _, rest = line.strip().partition(" ")
        try:
            if line.strip() in ("exit", "quit", "/exit", "/quit"):
                return True
            if name == "/set":
                setting, _, value = rest.strip().partition(" ")
                self.settings = set_value(self.settings, setting, value.strip())
                self.number = 0 if setting == "seed" else self.number  # a seed restarts with its first answer
            elif name == "/show":
                values = with_defaults(self.settings)
                print(*(f"{name:<21} {getattr(values, name)}" for name in SAMPLING), sep="\n")
            elif name == "/help":
                print(_HELP)
            elif name.startswith("/"):
                raise UserError(f"{name}: no such command; /help lists them")
            elif name:
                self.answer(line)
        except UserError as error:
            print(error, file=sys.stderr)
        return False

    def answer(self, prompt: str) -> None:
        with _interruptible() if self.terminal else contextlib.nullcontext(lambda: False) as stopped:
            echo = not self.terminal and not self.settings.quiet
            answers = print_answer(
                self.writer, (self.number, prompt), self.settings, self.source, self.say, echo=echo, stopped=stopped
            )
        self.say(speed(answers))
        self.number += 1


def set_value(settings: GenerateSettings, name: str, value: str) -> GenerateSettings:
    """`settings` with one of SAMPLING changed. Raises UserError in the words of the command line."""
    field = name.lstrip("-").replace("-", "_")
    if field not in SAMPLING:
        raise UserError(f"/set {name}: NAME VALUE, NAME one of {', '.join(SAMPLING)}")
    new = getattr(GenerateSettings(), field)
    if field == "stop" and value:
        new = (prompts.escapes(value),)
    elif value:
        parsed = parse(GenerateSettings, [f"{flag(field)}={value}"])
        new = getattr(parsed, field)
    changed = dataclasses.replace(settings, **{field: new})
    if problems := check_sampling(changed):
        raise UserError(*problems)
    return changed


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C ends the text after the token that is being made; a second one, a second later, ends the program."""
    when: list[float] = []

    def receive(number: int, frame: object) -> None:
        if when and time.monotonic() - when[0] > 1:
            raise KeyboardInterrupt
        when.append(time.monotonic())

    before = signal.signal(signal.SIGINT, receive)
    try:
        yield lambda: bool(when)
    finally:
        signal.signal(signal.SIGINT, before)
