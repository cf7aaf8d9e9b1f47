"""SIGTERM, SIGINT, SIGUSR1 and SIGHUP ask for a clean stop: save the complete steps, leave. A second ends at once."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from wikift.base.console import print
from wikift.base.launcher import launch

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# One Ctrl-C can arrive several times: from the terminal, from the launcher, from a scheduler's step.
_SAME_REQUEST_SECONDS = 1.0


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], int]]:
    """Yields a function that returns the number of the first signal received, 0 while there is none.

    A thread answers: Python's own handlers wait for the end of a backward pass, which may take a minute. An ignored
    SIGHUP stays ignored (nohup).
    """
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield lambda: 0
        return
    first = 0

    def receive(number: int, frame: FrameType | None) -> None:
        nonlocal first
        first = first or number

    reader, writer = socket.socketpair()
    writer.setblocking(False)
    numbers = [n for n in STOPPING if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, receive) for number in numbers}
    woken = signal.set_wakeup_fd(writer.fileno())
    terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
    threading.Thread(target=_answer, args=(reader, terminals), name="wikift-stop", daemon=True).start()
    try:
        yield lambda: first
    finally:
        signal.set_wakeup_fd(woken)
        for number, handler in before.items():
            signal.signal(number, handler)
        writer.close()  # ends the thread


def _answer(signals: socket.socket, terminals: list[int]) -> None:
    """Say on rank 0 that the first signal is heard; leave by the second. Closed `terminals` are used no more."""
    when = 0.0
    while number := int.from_bytes(signals.recv(1), "big"):
        if number not in STOPPING:
            continue
        for descriptor in terminals:
            if not os.isatty(descriptor):  # writing to it would be an error
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        if not when:
            when = time.monotonic()
            if launch().rank == 0:
                name = signal.Signals(number).name
                text = f"wikift: {name}: stops after this micro-batch and saves; again: stops at once"
                print(text, file=sys.stderr, flush=True)  # sys.stderr: a live panel prints it above itself
        elif time.monotonic() - when > _SAME_REQUEST_SECONDS:
            os.write(2, b"\nwikift: stopped at once; the newest complete checkpoint is kept\n")
            os._exit(128 + number)
    signals.close()


@contextlib.contextmanager
def stopping_by_exception() -> Iterator[None]:
    """Within, SIGINT raises KeyboardInterrupt, and SIGTERM and SIGHUP SystemExit, so that clean-up runs.

    Ignored signals stay ignored (nohup). Has no effect outside of the main thread, which alone may set handlers.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in ENDING}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
