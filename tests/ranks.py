"""Run a function on N real gloo ranks, each a process forked from a server that has torch loaded already.

No port is chosen: the ranks meet in a file. A rank that hangs is killed at the time limit, and the failing rank's own
traceback is what the test shows.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["transformers.models.gpt2.modeling_gpt2", "wikift.training.run", "tests.preload"])


def run_ranks(function: Callable[..., Any], ranks: int, *arguments: Any, timeout_seconds: float = 120) -> list[Any]:
    """`function(*arguments)` on every rank of a gloo group; what each returned, by rank.

    `function` is a module's own, and what it takes and gives can be pickled. Raises AssertionError with the traceback
    of the first rank that failed, or TimeoutError naming the ranks that were killed. What the ranks printed, stderr
    included, is printed here, rank by rank.
    """
    with tempfile.TemporaryDirectory() as folder:
        children = [start(function, rank, ranks, Path(folder) / "meeting", *arguments) for rank in range(ranks)]
        try:
            return collect(children, timeout_seconds)
        finally:
            for rank in range(ranks):
                print((Path(folder) / f"meeting.{rank}").read_text(errors="replace"), end="")


def each(function: Callable[..., Any], cases: list[tuple[Any, ...]]) -> list[Any]:
    """What `function` returns for each of `cases`: several measurements in one launch, `run_ranks(each, ...)`."""
    return [function(*case) for case in cases]


Child = tuple[Any, Connection]


def start(function: Callable[..., Any], rank: int, ranks: int, meeting: Path, *arguments: Any) -> Child:
    """Start one rank; `collect` waits for it."""
    ours, theirs = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_child, args=(theirs, function, rank, ranks, str(meeting), arguments))
    process.start()
    theirs.close()
    return process, ours


def collect(children: list[Child], timeout_seconds: float) -> list[Any]:
    """Wait for every rank, at most `timeout_seconds` in all."""
    deadline = time.monotonic() + timeout_seconds
    waiting = {connection: rank for rank, (_, connection) in enumerate(children)}
    results: dict[int, Any] = {}
    failures: list[str] = []
    while waiting and not failures and time.monotonic() < deadline:
        for ready in multiprocessing.connection.wait(list(waiting), timeout=0.2):
            assert isinstance(ready, Connection)
            rank = waiting.pop(ready)
            try:
                good, value = ready.recv()
            except EOFError:
                good, value = False, f"rank {rank} left without a word"
            if good:
                results[rank] = value
            else:
                failures.append(f"rank {rank}:\n{value}")
    if failures:  # the others may have failed because of it: give the first cause a moment to arrive
        for ready in multiprocessing.connection.wait(list(waiting), timeout=1.0):
            with contextlib.suppress(EOFError, OSError):
                assert isinstance(ready, Connection)
                good, value = ready.recv()
                if not good:
                    failures.append(f"rank {waiting[ready]}:\n{value}")
    hung = list(waiting.values()) if not failures else []
    for process, connection in children:
        if process.is_alive() and (hung or failures):
            process.kill()
        process.join(20)
        connection.close()
    if failures:
        raise AssertionError("\n".join(sorted(failures, key=lambda text: "gloo" in text)))
    if hung:
        raise TimeoutError(f"ranks {hung} had not ended after {timeout_seconds:g} s and were killed")
    return [results[rank] for rank in range(len(children))]


def _child(
    connection: Connection,
    function: Callable[..., Any],
    rank: int,
    ranks: int,
    meeting: str,
    arguments: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
    torch.set_num_threads(1)
    output = os.open(f"{meeting}.{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        if ranks > 1:
            dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
            dist.barrier()  # a rank with nothing to ask of the others would leave while they still connect to it
        else:
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
                del os.environ[name]
        result = function(*arguments)
        sys.stdout.flush()  # before the parent, told that all is done, reads it
        connection.send((True, result))
    except BaseException:
        connection.send((False, traceback.format_exc()))
        sys.stderr.flush()
        os._exit(1)
    finally:
        connection.close()
        sys.stdout.flush()
    os._exit(0)  # the process group's threads are not worth waiting for
