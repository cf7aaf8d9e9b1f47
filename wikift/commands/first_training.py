"""No trained model yet: say so, train one in a process of its own, and tell what it left.

The training is `launch/train.py` with this terminal, so it looks and stops (Ctrl-C saves) as always, and the memory it
took is free again before the first answer.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from wikift.base import folders
from wikift.base.errors import EnvironmentFault, UserError
from wikift.commands.main import EXIT_DONE, EXIT_INTERRUPTED, EXIT_USER
from wikift.settings import checks, run_plan
from wikift.settings.fields import EXCLUSIVE, TrainSettings
from wikift.settings.options import parse

_SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "train.py"
# installed without launch/
_MAIN = "from wikift.commands.main import run; from wikift.commands.train import main; run(main)"


def train_first(run: str | None, arguments: Sequence[str], *, allowed: bool, quiet: bool) -> tuple[int, str]:
    """Train `run` (None: the folder that the training chooses) with `arguments`; gives (exit code, the run's folder).

    Asks first on a terminal. Raises UserError where training is not `allowed` or not wanted, or its settings are wrong.
    """
    words = [*(["--output-dir", run] if run is not None else []), *arguments]
    given = parse(TrainSettings, words, prog="launch/train.py", description="", exclusive=EXCLUSIVE)
    settings = run_plan.resolve(given, 1)
    if run is not None and given.output_dir != run:
        raise UserError(f"--output-dir {given.output_dir}: the run to answer from is {run}; leave one of the two out")
    if problems := checks.check_train(settings, 1, launched=False):
        raise UserError(*problems)
    target = str(settings.output_dir)
    train, generate = f"python launch/train.py {shlex.join(words)}".rstrip(), f"python launch/generate.py {target}"
    what = f"{run} has no model yet" if run is not None else "no trained model yet"
    if not allowed:
        raise UserError(f"{what}; make one and try again:\n    {train}\n    {generate}")
    asks = sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()
    print(f"wikift: {what}; {'to make one' if asks else 'training one first'}:\n  {train}", file=sys.stderr, flush=True)
    if asks and not _agreed():
        raise UserError(f"{what}; when it suits you:\n    {train}\n    {generate}")
    code = _run([*_program(), *words, *(["--quiet"] if quiet and not given.quiet else [])])
    if code == EXIT_INTERRUPTED:
        print(f"wikift: the training is saved; the same command goes on with it\n  {generate}", file=sys.stderr)
    elif code == EXIT_USER:
        print("wikift: nothing was trained", file=sys.stderr)
    elif code != EXIT_DONE:
        print(
            f"wikift: the training failed (exit code {code}, its message is above); mend that, and the same command "
            f"{'goes on from its newest checkpoint' if folders.checkpoint_steps(Path(target)) else 'starts it again'}",
            file=sys.stderr,
        )
    elif not folders.is_run(Path(target)) or not folders.has_model(target):
        raise UserError(f"{target}: the training left no checkpoint there (a --dry-run?); nothing to answer from")
    return code, target


def _program() -> list[str]:
    return [sys.executable, str(_SCRIPT)] if _SCRIPT.is_file() else [sys.executable, "-c", _MAIN]


def _agreed() -> bool:
    print("train it now? [Y/n] ", end="", file=sys.stderr, flush=True)
    answer = sys.stdin.readline()
    return bool(answer) and answer.strip().lower() in ("", "y", "yes")


def _run(command: list[str]) -> int:
    """Run to the end. Ctrl-C reaches the child from the terminal; SIGTERM and SIGUSR1 are passed on to it.

    Its standard output is the terminal, or standard error where ours is a file or a pipe: only answers belong there.
    """
    sys.stdout.flush()
    with _signals_for() as receivers:
        try:
            # standard input is not for the child: in a pipe the prompts are in it
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=None if sys.stdout.isatty() else sys.stderr.fileno()
            )
        except OSError as error:
            raise EnvironmentFault(
                f"the training could not be started ({error.strerror}); nothing was changed"
            ) from None
        receivers.append(child)
        code = child.wait()
    return 128 - code if code < 0 else code


@contextlib.contextmanager
def _signals_for() -> Iterator[list[subprocess.Popen[bytes]]]:
    receivers: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: object) -> None:
        for child in receivers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, number)

    handlers = {signal.SIGINT: lambda number, frame: None, signal.SIGTERM: pass_on, signal.SIGUSR1: pass_on}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield receivers
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
