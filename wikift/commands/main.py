"""`wikift COMMAND ...`: which command, and how it ends. Expected failures are printed without a traceback."""

from __future__ import annotations

import importlib
import io
import os
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

COMMANDS = {  # name: its module, what it does
    "prepare": ("wikift.commands.prepare", "text to a token store"),
    "train": ("wikift.commands.train", "fine-tune GPT-2, or train it from scratch; the same command resumes"),
    "plan": ("wikift.commands.plan", "what a training would be, need and take: memory, time, the command to type"),
    "consolidate": ("wikift.commands.consolidate", "a run's checkpoint to a Hugging Face directory"),
    "evaluate": ("wikift.commands.evaluate", "perplexity of models by the field's protocols"),
    "generate": ("wikift.commands.generate", "prompts to text, interactive without one"),
    "report": ("wikift.commands.report", "runs as one HTML file: curves, settings, samples, scores"),
    "compare": ("wikift.commands.compare", "two runs: what differs, and whether the results are equal within a bound"),
    "runs": ("wikift.commands.runs", "the runs of a folder: state, steps, best score, size; --prune of checkpoints"),
    "log": ("wikift.commands.log", "a run's metrics into Weights & Biases, TensorBoard or a CSV file, whole, later"),
}


def main(argv: Sequence[str]) -> int:
    """`wikift COMMAND ...`; returns the exit code."""
    name, options = (argv[0], list(argv[1:])) if argv else ("--help", [])
    if name in ("-h", "--help"):
        print(_help())
        return EXIT_DONE
    if name == "--version":
        print(f"wikift {__version__}")
        return EXIT_DONE
    if name not in COMMANDS:
        raise UserError(f"{name}: no such command{nearest(name, list(COMMANDS))}; one of {', '.join(COMMANDS)}")
    return int(importlib.import_module(COMMANDS[name][0]).main(options))


def _help() -> str:
    program = as_typed("wikift train").removesuffix(" train")
    lines = [f"  {name:<12} {about}" for name, (_, about) in COMMANDS.items()]
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
