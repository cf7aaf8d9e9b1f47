"""A rank that is stopped or loops: the stacks of all, the name of the one, and the end of the run.

pytest tests/watch/test_hang.py
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import start
from tests.tiny import arguments, tiny_store, until
from wikift.watch.hang import Seen, told

SECONDS = 6  # --hang-timeout


def stuck(line: list[str], kind: str) -> None:
    """A training whose rank 1 stops, or loops, in its step 3."""
    import torch

    from wikift.base.world import seed
    from wikift.commands.train import main
    from wikift.model.gpt2 import NextTokenLoss

    forward = NextTokenLoss.forward

    def endless(self: Any, *inputs: Any) -> Any:
        its_turn = torch.initial_seed() == seed(42, "dropout", 3, 1)
        while its_turn:  # in nothing of torch's, which would look like waiting
            if kind == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
        return forward(self, *inputs)

    NextTokenLoss.forward = endless  # type: ignore[method-assign]
    main(line)


@pytest.mark.parametrize(("kind", "engine"), [("stopped", "ddp"), ("stopped", "fsdp"), ("loops", "ddp")])
def test_a_rank_that_hangs_is_named_and_the_run_ends(kind: str, engine: str, tmp_path: Path) -> None:
    run, meeting = tmp_path / "run", tmp_path / "meeting"
    words = arguments(tiny_store(tmp_path / "store"), run, hang_timeout=SECONDS, engine=engine)
    children = [start(stuck, rank, 2, meeting, words, kind) for rank in range(2)]
    stacks = [run / "stacks" / f"rank-{rank}.txt" for rank in range(2)]
    try:
        until(lambda: "step 3" in "".join(p.read_text() for p in run.glob("stacks/rank-0.beat")))
        if kind == "loops":  # at any time, by a signal to any rank
            os.kill(children[0][0].pid, signal.SIGUSR2)
            until(lambda: all(path.read_text().count("(most recent call first)") for path in stacks), seconds=SECONDS)
            assert all(process.is_alive() for process, _ in children)
        children[0][0].join(60)
        assert children[0][0].exitcode == 1
        if kind == "loops":
            children[1][0].join(20)
            assert children[1][0].exitcode == 1
            assert "in endless" in stacks[1].read_text()
    finally:
        for process, connection in children:
            process.kill()
            process.join()
            connection.close()
    waits = {"ddp": "in _engine_run_backward", "fsdp": "in forward_backward"}[engine]  # FSDP gathers in the forward
    assert waits in stacks[0].read_text()
    message = (tmp_path / "meeting.0").read_text()
    named = {"stopped": "rank 1 shows no sign of life", "loops": "rank 1 does not do what the others wait for"}[kind]
    assert f"wikift: no progress for {SECONDS} s (--hang-timeout): {named}" in message
    assert f"Every rank's stacks are in {run}/stacks" in message
    if kind == "stopped":
        assert "no sign of life" in stacks[1].read_text()


def test_a_run_that_ends_leaves_no_stacks(tmp_path: Path) -> None:
    from wikift.commands.train import main

    assert main(arguments(tiny_store(tmp_path / "store"), tmp_path / "run", max_steps=2)) == 0
    assert not (tmp_path / "run" / "stacks").exists()


@pytest.mark.parametrize(
    ("seen", "silent", "expected"),
    [
        ({0: Seen(7, True, "a"), 1: Seen(5, True, "b"), 2: Seen(7, True, "a")}, [], "rank 1 is behind the others"),
        ({0: Seen(7, True, "a"), 1: Seen(7, True, "b"), 2: Seen(7, True, "a")}, [], "rank 1 does not do what"),
        ({0: Seen(7, False, "a"), 1: Seen(7, False, "a")}, [], "no rank is behind the others; rank 0, 1: a"),
        ({0: Seen(7, True, "a"), 1: Seen(3, True, "b")}, [1, 2], "rank 1, 2 shows no sign of life"),
    ],
)
def test_who_is_blamed(seen: dict[int, Seen], silent: list[int], expected: str) -> None:
    assert told(seen, silent).startswith(expected)
