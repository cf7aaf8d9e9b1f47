"""One command to its exit code: the two kinds of expected failure are printed without a traceback."""

from __future__ import annotations

import os
import sys
import time
import typing
from collections.abc import Callable, Sequence

from wikift.base.errors import EnvironmentFault, UserError

EXIT_DONE = 0
EXIT_FAULT = 1
EXIT_USER = 2
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: stopped by a signal, all saved, "try again" goes on


def run(command: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> typing.NoReturn:
    """Run one command to its exit code, printing the two kinds of expected failure without a traceback."""
    try:
        code = command(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
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
    except KeyboardInterrupt:
        print("wikift: interrupted", file=sys.stderr)
        code = 130
    if code not in (EXIT_DONE, EXIT_INTERRUPTED) and _several_hosts():
        from wikift.base.world import tell_other_hosts

        tell_other_hosts()
    if "RANK" in os.environ:  # a process group's destructors may never end: see world.stop_world
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _several_hosts() -> bool:
    local = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE", "1")
    return "MASTER_ADDR" in os.environ and os.environ.get("WORLD_SIZE", "1") != local


def report(error: UserError) -> int:
    """Print every problem of the user's; gives the exit code."""
    count = len(error.problems)
    head = "wikift: " + ("one problem" if count == 1 else f"{count} problems")
    print(head, *(f"  {problem}" for problem in error.problems), sep="\n", file=sys.stderr)
    return EXIT_USER
