"""`wikift COMMAND ...`: which command, and how it ends. Expected failures are printed without a traceback."""

from __future__ import annotations

import importlib
import io
import os
import re
import sys
import threading
import time
import typing
from collections.abc import Callable, Sequence

from wikift import __version__
from wikift.base.command import as_typed
from wikift.base.console import print
from wikift.base.errors import (
    EXIT_DONE,
    EXIT_FAULT,
    EXIT_INTERRUPTED,
    EXIT_USER,
    EnvironmentFault,
    UserError,
    nearest,
    one_line,
    report,
)
from wikift.base.launcher import Launch, end_restarts, launch
from wikift.settings.run_fields import SETTINGS


def main(argv: Sequence[str]) -> int:
    """`wikift COMMAND ...`; returns the exit code."""
    name, options = (argv[0], list(argv[1:])) if argv else ("--help", [])
    if name in ("-h", "--help"):
        print(_help())
        return EXIT_DONE
    if name == "--version":
        print(f"wikift {__version__}")
        return EXIT_DONE
    if name not in SETTINGS:
        raise UserError(f"{name}: no such command{nearest(name, list(SETTINGS))}; one of {', '.join(SETTINGS)}")
    return int(importlib.import_module(f"wikift.commands.{name}").main(options))


def _help() -> str:
    program = as_typed("wikift train").removesuffix(" train")
    lines = [f"  {name:<12} {re.split('[.:;]', kind.__doc__ or '')[0]}" for name, kind in SETTINGS.items()]
    return "\n".join([
        f"usage: {program} COMMAND [options]", "", "GPT-2 and WikiText, from raw text to a fine-tuned model.", "",
        "commands:", *lines, "", f"`{program} COMMAND --help` lists a command's settings; --version prints the version",
    ])  # fmt: skip


def start() -> typing.NoReturn:
    """The program `wikift`, and `python -m wikift`."""
    run(main)


def run(command: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> typing.NoReturn:
    """Run one command to its exit code, printing the two kinds of expected failure without a traceback."""
    here = Launch()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that it has no letters for does not end a command
            stream.reconfigure(errors="backslashreplace")
    try:
        here = launch()
        code = command(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except UserError as error:
        if not here.local_rank:
            code = report(error)
        else:
            time.sleep(2)  # the launcher ends its ranks when the first one leaves: let one speak, on each host
            code = EXIT_USER
    except EnvironmentFault as error:
        print(f"wikift: {error}", file=sys.stderr)
        code = EXIT_FAULT
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_FAULT
    except OSError as error:  # that nobody expected: a disk, a permission, a path
        print(f"wikift: {one_line(error)}", file=sys.stderr)
        code = EXIT_FAULT
    except KeyboardInterrupt:
        print("wikift: interrupted", file=sys.stderr)
        code = 130
    if code not in (EXIT_DONE, EXIT_INTERRUPTED) and here.address and here.size != here.local_size:
        from wikift.base.failure import TELL_SECONDS, tell_other_hosts

        telling = threading.Thread(target=tell_other_hosts, daemon=True)
        telling.start()
        telling.join(TELL_SECONDS)  # they may be gone
    if code == EXIT_USER:
        end_restarts(here)
    if here.started:  # a process group's destructors may never end: see world.stop_world
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
