"""SIGTERM, SIGINT and SIGUSR1 ask for a clean stop: finish the step, save, leave. A second request stops at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# One Ctrl-C can arrive several times: from the terminal, from the launcher, from a scheduler's step.
_SAME_REQUEST_SECONDS = 1.0


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], int]]:
    """Yields a function that returns the number of the first signal received, 0 while there is none."""
    first, when = 0, 0.0

    def receive(number: int, frame: object) -> None:
        nonlocal first, when
        if not first:
            first, when = number, time.monotonic()
        elif time.monotonic() - when > _SAME_REQUEST_SECONDS:
            os.write(2, b"\nwikift: stopped at once; the newest complete checkpoint is kept\n")
            os._exit(128 + number)

    in_main = threading.current_thread() is threading.main_thread()  # which alone may set handlers
    before = {number: signal.signal(number, receive) for number in STOPPING if in_main}
    try:
        yield lambda: first
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
