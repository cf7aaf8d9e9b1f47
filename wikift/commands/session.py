"""The interactive session of `wikift generate`: a prompt a line, commands that begin with `/`.

On a terminal lines are edited and remembered by `readline`; in a pipe each line that is not blank is a prompt.
"""

from __future__ import annotations

import cmd
import contextlib
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from wikift.base.errors import EXIT_DONE, UserError
from wikift.commands.answers import as_json, print_answer, speed
from wikift.generation import prompts
from wikift.settings import options as cli
from wikift.settings.fields import GenerateSettings
from wikift.settings.generate_checks import SAMPLING, check_sampling, with_defaults

if TYPE_CHECKING:
    from wikift.generation.writer import Writer

_LEAVE = ("exit", "quit", "/exit", "/quit")
_HISTORY_LINES = 1000


def converse(writer: Writer, settings: GenerateSettings, source: str, say: Callable[[str], None]) -> int:
    """Answer line after line until the input ends; returns the exit code."""
    terminal = sys.stdin is not None and sys.stdin.isatty()
    session = _Session(writer, settings, source, say, terminal)
    if not terminal:
        any(session.onecmd(line.rstrip("\r\n")) for line in sys.stdin or ())
        return EXIT_DONE
    say("/help lists the commands, Ctrl-D leaves")
    with _history():
        while True:
            try:
                session.cmdloop()
                return EXIT_DONE
            except KeyboardInterrupt:  # drops the line begun
                print("\n/quit or Ctrl-D leaves", file=sys.stderr)


class _Session(cmd.Cmd):
    """The settings, the answers under this seed, and what was answered. A command /NAME is the method do_NAME."""

    def __init__(
        self, writer: Writer, settings: GenerateSettings, source: str, say: Callable[[str], None], terminal: bool
    ) -> None:
        super().__init__()
        self.writer, self.settings, self.source, self.say, self.terminal = writer, settings, source, say, terminal
        self.prompt = "> " if sys.stdout.isatty() else ""  # a file gets answers only
        self.number, self.last, self.saved = 0, "", list[str]()

    def onecmd(self, line: str) -> bool:
        """Answer or obey one line; whether it was the last."""
        name, _, rest = line.strip().partition(" ")
        if line.strip() in _LEAVE or (self.terminal and line == "EOF"):  # cmd.Cmd's word for Ctrl-D
            print(end="\n" if line == "EOF" else "")
            return True
        command = getattr(self, f"do_{name[1:]}", None) if name.startswith("/") else self.answer
        try:
            if command is None:
                raise UserError(f"{name}: no such command; /help lists them")
            if line.strip():
                command(line if command == self.answer else rest.strip())
        except UserError as error:
            print(error, file=sys.stderr)
        return False

    def answer(self, prompt: str) -> None:
        """The model continues it."""
        if prompt == self.last and self.settings.temperature == 0 and self.settings.num_beams == 1:
            self.say("the same prompt gives the same text at temperature 0; /set temperature 0.8 draws")
        with _interruptible() if self.terminal else contextlib.nullcontext(lambda: False) as stopped:
            echo = not self.terminal and not self.settings.quiet
            answers = print_answer(
                self.writer, (self.number, prompt), self.settings, self.source, self.say, echo=echo, stopped=stopped
            )
        self.say(speed(answers))
        self.saved += [as_json(answer, self.settings, self.source) for answer in answers]
        self.number, self.last = self.number + 1, prompt

    def do_set(self, text: str) -> None:
        """NAME VALUE|change a setting; without a value, back to its default"""
        name, _, value = text.partition(" ")
        self.settings = set_value(self.settings, name, value.strip())
        if name == "seed":  # a seed set begins that seed's answers from the first
            self.number = 0

    def do_seed(self, text: str) -> None:
        """N|begin the answers of seed N from the first"""
        self.do_set(f"seed {text}")

    def do_retry(self, text: str) -> None:
        """|answer the last prompt again, with other random numbers"""
        if not self.last:
            raise UserError("/retry: there was no prompt yet")
        self.answer(self.last)

    def do_save(self, name: str) -> None:
        """FILE|write all answers so far to a new file, as lines of JSON"""
        if not name or not self.saved:
            raise UserError("/save FILE, once there is an answer")
        try:
            with Path(name).expanduser().open("x", encoding="utf-8", errors="replace") as file:
                file.writelines(f"{line}\n" for line in self.saved)
        except FileExistsError:
            raise UserError(f"/save {name}: exists; name another file") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"/save {name}: cannot be written ({reason}); name another file") from None
        print(f"{name}: {len(self.saved)} answers", file=sys.stderr)

    def do_show(self, text: str) -> None:
        """|the settings and their values"""
        values = with_defaults(self.settings)
        _print_table((name, str(getattr(values, name))) for name in SAMPLING)

    def do_help(self, text: str) -> None:
        """|this"""
        commands = [("TEXT", "the model continues it")]
        for name in ("set", "seed", "retry", "save", "show", "help"):
            words, _, meaning = (getattr(self, f"do_{name}").__doc__ or "").partition("|")
            commands.append((f"/{name} {words}", meaning))
        _print_table([*commands, ("/quit, Ctrl-D", "leave"), ("Ctrl-C", "stop the text")])


def set_value(settings: GenerateSettings, name: str, value: str) -> GenerateSettings:
    """`settings` with one of SAMPLING changed. Raises UserError in the words of the command line."""
    field = name.lstrip("-").replace("-", "_")
    if field not in SAMPLING:
        raise UserError(f"/set {name}: NAME VALUE, NAME one of {', '.join(SAMPLING)}")
    new = getattr(GenerateSettings(), field)
    if field == "stop" and value:
        new = (prompts.escapes(value),)
    elif value:
        parsed = cli.parse(GenerateSettings, [cli.flag(field) + "=" + value], prog="/set", description="")
        new = getattr(parsed, field)
    changed = dataclasses.replace(settings, **{field: new})
    if problems := check_sampling(changed):
        raise UserError(*problems)
    return changed


def _print_table(rows: Iterator[tuple[str, str]] | list[tuple[str, str]]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    Console(markup=False, highlight=False).print(table)


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


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """A history that outlives the session: $XDG_STATE_HOME/wikift/history or ~/.wikift_history."""
    try:
        import readline
    except ImportError:  # a Python built without it: plain input
        yield
        return
    state = os.environ.get("XDG_STATE_HOME")
    path = Path(state, "wikift", "history") if state else Path("~/.wikift_history").expanduser()
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(_HISTORY_LINES)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # a history that cannot be written does not end the session in an error
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)
