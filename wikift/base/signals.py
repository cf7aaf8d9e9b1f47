"""SIGTERM, SIGINT and SIGUSR1 ask for a clean stop: finish the step, save, leave. A second request stops at once."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
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
            os.write(2, b"\nwikift: stopped at once; the newest complete checkpoint stands\n")
            os._exit(128 + number)

    before = {number: signal.signal(number, receive) for number in STOPPING}
    try:
        yield lambda: first
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
