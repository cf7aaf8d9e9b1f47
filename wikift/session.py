"""The interactive session of launch/generate.py: a prompt, commands that begin with `/`, history, Ctrl-C and Ctrl-D.

On a terminal lines are edited and remembered by `readline`; in a pipe each line that is not blank is a prompt.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from wikift import cli
from wikift.answers import SAMPLING, check_sampling, print_answer
from wikift.command import EXIT_DONE
from wikift.config import GenerateSettings
from wikift.errors import UserError

if TYPE_CHECKING:
    from wikift.sampling import Writer

HELP = """\
TEXT             the model goes on from there
/set NAME VALUE  change a setting
/show            the settings and their values
/help            this
/quit, Ctrl-D    leave      Ctrl-C stops the text"""
_HISTORY_LINES = 1000


def converse(writer: Writer, settings: GenerateSettings, source: str, say: Callable[[str], None]) -> int:
    """Answer line after line until the input ends; gives the exit code."""
    terminal = sys.stdin is not None and sys.stdin.isatty()
    if terminal and not settings.quiet:
        print("/help lists the commands, Ctrl-D leaves", file=sys.stderr)
    number = 0
    with _history() if terminal and sys.stdout.isatty() else contextlib.nullcontext():
        for line in _lines(terminal):
            if line.startswith("/"):
                if line.split()[0] in ("/quit", "/exit"):
                    break
                changed = _command(line, settings)
                number = number if changed.seed == settings.seed else 0  # /set seed begins that seed's answers anew
                settings = changed
            elif line.strip():
                with _interruptible() if terminal else contextlib.nullcontext(lambda: False) as stopped:
                    echo = not terminal and not settings.quiet
                    print_answer(writer, line, settings, number, source, say, echo=echo, stopped=stopped)
                number += 1
    return EXIT_DONE


def set_value(settings: GenerateSettings, name: str, value: str) -> GenerateSettings:
    """`settings` with one of SAMPLING changed. Raises UserError in the words of the command line."""
    field = name.lstrip("-").replace("-", "_")
    if field not in SAMPLING:
        raise UserError(f"{name}: is none of {', '.join(SAMPLING)}")
    read = cli.parse(GenerateSettings, [cli.flag(field) + "=" + value], prog="/set", description="")
    changed = dataclasses.replace(settings, **{field: getattr(read, field)})
    if problems := check_sampling(changed):
        raise UserError(*problems)
    return changed


def _command(line: str, settings: GenerateSettings) -> GenerateSettings:
    name, *words = line.split()
    if name == "/set" and len(words) == 2:
        try:
            return set_value(settings, *words)
        except UserError as error:
            print(error, file=sys.stderr)
    elif name == "/set":
        print(f"/set NAME VALUE, NAME one of {', '.join(SAMPLING)}", file=sys.stderr)
    elif name == "/show":
        print(*(f"{field:<20}{getattr(settings, field)}" for field in SAMPLING), sep="\n")
    elif name == "/help":
        print(HELP)
    else:
        print(f"{name}: no such command; /help lists them", file=sys.stderr)
    return settings


def _lines(terminal: bool) -> Iterator[str]:
    """What the user types, or the lines of a pipe. On a terminal Ctrl-C drops the line begun."""
    while True:
        try:
            if terminal and sys.stdout.isatty():
                yield input("> ")
                continue
            if terminal:  # standard output is a file: what is not an answer must not go there
                print("> ", end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline() if sys.stdin is not None else ""
            if not line:
                return
            yield line.rstrip("\r\n")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            print("\n/quit or Ctrl-D leaves", file=sys.stderr)


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
    """Line editing, and a history that outlives the session: $XDG_STATE_HOME/wikift/history or ~/.wikift_history."""
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
        with contextlib.suppress(OSError):  # no history is no reason to fail
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)
