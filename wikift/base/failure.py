"""How a failing rank ends all of them: it says why first, then the others leave, within seconds and on every host."""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

import torch.distributed as dist

from wikift.base.console import print
from wikift.base.errors import EXIT_FAULT, EXIT_USER, EnvironmentFault, UserError, one_line, report
from wikift.base.launcher import Launch, end_restarts, launch, meeting
from wikift.base.world import COLLECTIVE_SECONDS, World, shared_store, start_world, stop_world

_PREFIX, _FAILED, _WAITED = "wikift", "wikift/failed", "wikift/waited"
_GRACE_SECONDS = 5.0
TELL_SECONDS = 20


@contextlib.contextmanager
def started_world(device: str = "auto", seconds: float = COLLECTIVE_SECONDS) -> Iterator[World]:
    """`start_world`, and at the end `stop_world`. A rank that raises says why first, then ends all the others.

    Without this a rank that raised would leave the others in a collective until its timeout of `seconds`.
    """
    here = launch()
    if not here.address or here.size == 1:
        yield start_world(device, seconds)
        stop_world()
        return
    with meeting(here.rank):
        store = shared_store(_PREFIX)
    _start_watching(store, here.rank)  # before the others are waited for: one may have failed already
    try:
        with meeting(here.rank):
            world = start_world(device, seconds)
        yield world
        stop_world()
    except Exception as error:
        _fail(error, store, here, seconds)


def tell_other_hosts() -> None:
    """Before a process group exists: tell the processes of other hosts, which wait for this one, that it has failed.

    Says nothing and gives up after 20 seconds where nobody listens: they have failed too.
    """
    here = launch()
    host, _, port = here.address.rpartition(":")
    deadline = time.monotonic() + TELL_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(Exception), socket.create_connection((host.strip("[]"), int(port)), timeout=1.0):
            _first_failure(shared_store(_PREFIX, datetime.timedelta(seconds=TELL_SECONDS)), here.rank, wait=False)
            return
        time.sleep(0.5)


def _start_watching(store: Any, rank: int) -> None:
    """A thread that ends this process when another rank has failed, and stops it gently when the launcher is gone."""
    parent = os.getppid()

    def watch() -> None:
        while True:
            time.sleep(1.0)
            if os.getppid() != parent:  # torchrun was killed: an orphan would train on, unseen
                os.kill(os.getpid(), signal.SIGTERM)
                return
            with contextlib.suppress(Exception):  # a store that is gone is what the main thread reports
                if (failed := _failed_rank(store)) not in (None, rank):
                    time.sleep(_GRACE_SECONDS)  # the main thread has left by then, unless it waits without end
                    print(f"wikift: rank {rank} stops, rank {failed} failed", file=sys.stderr, flush=True)
                    os._exit(EXIT_FAULT)

    threading.Thread(target=watch, name="wikift-watch", daemon=True).start()


def _failed_rank(store: Any) -> int | None:
    return int(store.get(_FAILED)) if store.check([_FAILED]) else None


def _fail(error: Exception, store: Any, here: Launch, seconds: float) -> NoReturn:
    """Say why, tell the others, leave at once: destructors of a broken process group may wait for ever."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher that notices must not end it before it has spoken
    rank, expected = here.rank, isinstance(error, (UserError, EnvironmentFault, OSError))
    lost_peer = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
    if lost_peer:
        with contextlib.suppress(Exception):  # the store went with its host
            store.set(f"{_WAITED}/{rank}", "")
    # A lost peer has a cause elsewhere, and a wrong setting is wrong on every rank: let the one speak that knows.
    first = _first_failure(store, rank, wait=lost_peer or (expected and rank != 0))
    if lost_peer and first is None:
        text = _lost(error, store, here, seconds)
    elif first not in (None, rank):
        text = "" if expected else f"rank {rank} stops, rank {first} failed"
    else:
        known = one_line(error) if isinstance(error, OSError) else str(error)
        text = known if expected else f"rank {rank} failed:\n{traceback.format_exc().rstrip()}"
    if isinstance(error, UserError) and text:
        report(error)
    elif text:
        print(f"wikift: {text}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if first != rank:
        time.sleep(1.0)  # the launcher names the rank that left first as the cause
    if isinstance(error, UserError):
        end_restarts(launch())
    os._exit(EXIT_USER if isinstance(error, UserError) else EXIT_FAULT)


def _lost(error: Exception, store: Any, here: Launch, seconds: float) -> str:
    """Whom this rank waited for: those that do not say that they waited, too; and where, if it was for too long."""
    others = "another process"
    with contextlib.suppress(Exception):
        if absent := [rank for rank in range(here.size) if not store.check([f"{_WAITED}/{rank}"])]:
            others = f"rank {', '.join(map(str, absent))}"
    if "timed out" in str(error).lower():
        frame = [one for one in traceback.extract_tb(error.__traceback__) if "/wikift/" in one.filename][-1]
        since = time.strftime("%H:%M:%S", time.localtime(time.time() - seconds - _GRACE_SECONDS))
        where = f"{frame.name} ({os.path.basename(frame.filename)}:{frame.lineno})"
        why = f"waited {seconds:g} s for {others}, since {since} in {where}; see what it does"
    else:
        why = (
            f"lost the connection to {others}; out of memory is likely: lower --per-device-train-batch-size or "
            "--block-size, or use --gradient-checkpointing or --engine fsdp"
        )
    return f"rank {here.rank} {why}. The same command resumes from the newest checkpoint"


def _first_failure(store: Any, rank: int, *, wait: bool) -> int | None:
    """The rank that failed first, this one where it does not `wait` for another's word; None where none said so."""
    deadline = time.monotonic() + (_GRACE_SECONDS if wait else 0.0)
    try:
        while (first := _failed_rank(store)) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if first is None:
            store.set(_FAILED, str(rank))
            first = None if wait else rank
        return first
    except Exception:  # the store went with its host
        return None if wait else rank
