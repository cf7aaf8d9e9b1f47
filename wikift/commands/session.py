"""The interactive session of `wikift generate`: a prompt, commands that begin with `/`, history, Ctrl-C and Ctrl-D.

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

from wikift.base.errors import EXIT_DONE, UserError
from wikift.generation import prompts
from wikift.generation.answers import SAMPLING, as_json, check_sampling, print_answer, speed
from wikift.settings import options as cli
from wikift.settings.fields import GenerateSettings

if TYPE_CHECKING:
    from wikift.generation.writer import Writer

HELP = """\
TEXT             the model goes on from there
/set NAME VALUE  change a setting (/set stop takes the stop strings away)
/seed N          begin the answers of seed N anew
/retry           answer the last prompt again, with other random numbers
/save FILE       write all answers so far to a new file, as lines of JSON
/show            the settings and their values
/help            this
/quit, Ctrl-D    leave      Ctrl-C stops the text"""
_HISTORY_LINES = 1000


@dataclasses.dataclass(frozen=True)
class _State:
    """What the commands of a session change: the settings, the answers under this seed, and what was said."""

    settings: GenerateSettings
    source: str
    number: int = 0
    prompt: str | None = None
    lines: tuple[str, ...] = ()


def converse(writer: Writer, settings: GenerateSettings, source: str, say: Callable[[str], None]) -> int:
    """Answer line after line until the input ends; gives the exit code."""
    terminal = sys.stdin is not None and sys.stdin.isatty()
    if terminal and not settings.quiet:
        print("/help lists the commands, Ctrl-D leaves", file=sys.stderr)
    state = _State(settings, source)
    with _history() if terminal and sys.stdout.isatty() else contextlib.nullcontext():
        for line in _lines(terminal):
            if line.split()[:1] in (["/quit"], ["/exit"]):
                break
            if line.split() == ["/retry"]:
                if state.prompt is None:
                    print("/retry: there was no prompt yet", file=sys.stderr)
                else:
                    state = _answer(writer, state, state.prompt, say, terminal)
            elif line.startswith("/"):
                state = _command(line, state)
            elif line.strip():
                state = _answer(writer, state, line, say, terminal)
    return EXIT_DONE


def _answer(writer: Writer, state: _State, prompt: str, say: Callable[[str], None], terminal: bool) -> _State:
    settings = state.settings
    if prompt == state.prompt and settings.temperature == 0 and settings.num_beams == 1:
        say("the same prompt gives the same text at temperature 0; /set temperature 0.8 draws")
    with _interruptible() if terminal else contextlib.nullcontext(lambda: False) as stopped:
        echo = not terminal and not settings.quiet
        found = print_answer(writer, prompt, settings, state.number, state.source, say, echo=echo, stopped=stopped)
    say(speed(found))
    lines = (*state.lines, *(as_json(answer, settings, state.source) for answer in found))
    return dataclasses.replace(state, number=state.number + 1, prompt=prompt, lines=lines)


def set_value(settings: GenerateSettings, name: str, value: str) -> GenerateSettings:
    """`settings` with one of SAMPLING changed. Raises UserError in the words of the command line."""
    field = name.lstrip("-").replace("-", "_")
    if field not in SAMPLING:
        raise UserError(f"{name}: is none of {', '.join(SAMPLING)}")
    if field == "stop":
        changed = dataclasses.replace(settings, stop=(prompts.escapes(value),) if value else ())
    else:
        read = cli.parse(GenerateSettings, [cli.flag(field) + "=" + value], prog="/set", description="")
        changed = dataclasses.replace(settings, **{field: getattr(read, field)})
    if problems := check_sampling(changed):
        raise UserError(*problems)
    return changed


def _command(line: str, state: _State) -> _State:
    name, *words = line.split()
    settings = state.settings
    if name == "/seed" and len(words) == 1:
        name, words = "/set", ["seed", *words]
    if name == "/set" and (len(words) == 2 or words[:1] == ["stop"]):
        try:
            settings = set_value(settings, words[0], " ".join(words[1:]))
        except UserError as error:
            print(error, file=sys.stderr)
            return state
        number = 0 if words[0] == "seed" else state.number  # a seed set begins that seed's answers anew
        return dataclasses.replace(state, settings=settings, number=number)
    if name == "/set":
        print(f"/set NAME VALUE, NAME one of {', '.join(SAMPLING)}", file=sys.stderr)
    elif name == "/seed":
        print("/seed N, N a whole number", file=sys.stderr)
    elif name == "/save":
        _save(line.partition("/save")[2].strip(), state)
    elif name == "/show":
        values = {field: getattr(settings, field) for field in SAMPLING}
        print(
            *(
                f"{field:<22}{value if field != 'stop' else ', '.join(map(repr, value)) or 'none'}"
                for field, value in values.items()
            ),
            sep="\n",
        )
    elif name == "/help":
        print(HELP)
    else:
        print(f"{name}: no such command; /help lists them", file=sys.stderr)
    return state


def _save(name: str, state: _State) -> None:
    """All answers of the session to a file that is not there yet."""
    if not name or not state.lines:
        print("/save FILE, once there is an answer", file=sys.stderr)
        return
    try:
        with Path(name).expanduser().open("x", encoding="utf-8", errors="replace") as file:
            file.writelines(f"{line}\n" for line in state.lines)
    except FileExistsError:
        print(f"/save {name}: is there already; name another file", file=sys.stderr)
    except (OSError, ValueError) as error:
        print(f"/save {name}: cannot be written ({getattr(error, 'strerror', None) or error})", file=sys.stderr)
    else:
        print(f"{name}: {len(state.lines)} answers", file=sys.stderr)


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
