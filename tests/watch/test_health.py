"""Health: what is called a worry and what is not, and a poisoned or drifting rank under the engines.

pytest tests/watch/test_health.py
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.matrix import Place, line, train_all
from tests.ranks import run_ranks
from tests.tiny import metrics, tiny_store
from wikift.base.errors import EnvironmentFault
from wikift.watch.health import WINDOW, drift, events


def rows(count: int, course: Callable[[int], float], **changed: Callable[[int], Any]) -> list[dict[str, Any]]:
    """Lines every ten seconds, of a healthy run of two ranks but for what is `changed`."""
    noise = random.Random(0)
    return [
        {
            "step": 10 * n, "loss": course(n) + noise.gauss(0, 0.03), "grad_norm": 0.8 + abs(noise.gauss(0, 0.2)),
            "learning_rate": 5e-5, "tokens": 10_000 * n, "tokens_per_second": 1000.0,
            "ranks": {"memory_gb": [1.0] * 3, "data_wait": [0.01] * 3, "matmul_ms": [5.0, 5.5, 5.2],
                      "busy": [0.3, 0.4, 0.35]},
            **{key: value(n) for key, value in changed.items()},
        }
        for n in range(1, count + 1)
    ]  # fmt: skip


def worries(lines: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """(line, event) of a whole run, and of one that resumes in its middle: the same."""
    seen = [list(events(lines[max(0, n - WINDOW) : n], lines[n], n)) for n in range(len(lines))]
    for made in seen:
        assert all(event["step"] % 10 == 0 and len(event["message"]) > 40 for event in made)
    return [(n, event["event"]) for n, made in enumerate(seen, 1) for event in made]


def falling(n: int) -> float:
    return 3.2 + math.exp(-n / 60)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (rows(300, falling), []),
        (rows(300, lambda n: 4 + 7 * math.exp(-n / 9)), []),  # from scratch
        (rows(120, lambda n: falling(n) + (n == 90)), [(90, "loss spike")]),
        (rows(120, falling, loss=lambda n: None if n == 90 else falling(n)), []),  # not finite: an event of its own
        (rows(120, falling, grad_norm=lambda n: 9.0 if n in (50, 51) else 0.8 + n % 3 / 9), [(50, "gradient norm")]),
        (rows(120, falling, grad_norm=lambda n: 0.8 + (1.2 if n == 50 else n % 3 / 90)), []),  # far, but not large
        (rows(250, lambda n: 10.8), [(100, "no learning")]),
        (rows(250, lambda n: 10.8 if n < 200 else 9, learning_rate=lambda n: 1e-6 * min(n, 150)), []),  # warm-up
        (rows(40, falling, ranks=lambda n: {"matmul_ms": [5.0, 12.0 if n > 20 else 5.0, 5.1]}), [(25, "late rank")]),
        (rows(40, falling, ranks=lambda n: {"matmul_ms": [5.0, 12.0]}), [(5, "late rank")]),  # once
        (rows(40, falling, ranks=lambda n: {"data_wait": [0.0, 0.3]}, tokens=lambda n: 500 * n), [(21, "late rank")]),
        (rows(40, falling, ranks=lambda n: {"data_wait": [0.0, 0.3 if n % 5 else 0.0]}), []),
        (rows(40, falling, ranks=lambda n: {"busy": [0.3, 0.8 if n > 20 else 0.3, 0.2]}), [(25, "late rank")]),
        (rows(40, falling, ranks=lambda n: {"data_wait": [0.0, 0.3 if n > 9 else 0.0]}), [(14, "late rank")]),
    ],
)  # fmt: skip
def test_what_is_a_worry(lines: list[dict[str, Any]], expected: list[tuple[int, str]]) -> None:
    assert worries(lines) == expected


def test_ranks_that_differ_are_named() -> None:
    assert not list(drift(5, [7.0] * 4))
    (event,) = drift(5, [7.0, 7.0, 8.0, 7.0])
    assert (event["step"], event["event"]) == (5, "drift")
    assert "weights of rank 2 are not those" in event["message"]


def poisoned(arguments: list[str], sick: int, kind: str) -> str:
    """A training whose rank `sick` computes a NaN in step 6, or changes a weight of its own; what it failed with."""
    import torch

    from wikift.base.world import seed
    from wikift.commands.train import main
    from wikift.model.gpt2 import NextTokenLoss

    forward, bad, times = NextTokenLoss.forward, seed(42, "dropout", 6, sick), 0

    def broken(self: Any, *inputs: Any) -> Any:
        nonlocal times
        here = self.training and torch.initial_seed() == bad
        times += here
        if here and kind == "drift":
            with torch.no_grad():
                next(self.parameters()).view(-1)[0] += 1e-3
        return forward(self, *inputs) * (
            math.nan if here and (kind == "nan" or (kind == "nan once" and times == 1)) else 1.0
        )

    NextTokenLoss.forward = broken  # type: ignore[method-assign]
    try:
        main(arguments)
    except EnvironmentFault as fault:
        return str(fault)
    return ""


SLOW = pytest.mark.long
ENGINES = [Place("single", 1), Place("ddp", 2), Place("zero1", 2), *(
    pytest.param(Place(engine, 2), marks=SLOW) for engine in ("fsdp", "zero2", "zero3"))]  # fmt: skip


@pytest.mark.parametrize("place", ENGINES, ids=str)
def test_a_poisoned_batch_is_skipped_where_that_is_asked_for(place: Place, tmp_path: Path) -> None:
    store, run, sick = tiny_store(tmp_path / "store"), tmp_path / "run", place.ranks - 1
    words = line(place, store, run, on_nonfinite="skip", logging_steps=3, max_steps=9, save_steps=9, eval_steps=9)
    assert run_ranks(poisoned, place.ranks, words, sick, "nan") == [""] * place.ranks
    (event,) = [row for row in metrics(run) if "event" in row]
    assert (event["step"], event["event"]) == (6, "not finite")
    assert "1 step skipped, step 6 the last" in event["message"]
    assert ("on rank 1" in event["message"]) is (place.ranks == 2)
    logged = [row for row in metrics(run) if "event" not in row]
    assert [row["loss"] is None for row in logged] == [False, False, True, False]
    assert [row.get("skipped_steps") for row in logged] == [None, None, 1, 1]
    assert logged[-1]["eval_loss"] < 4.6


def sleepy(line: list[str]) -> int:
    """A training whose rank 1 sleeps in each step; signs of it are gathered in a second, not in twenty."""
    import torch.distributed as dist

    from wikift.commands.train import main
    from wikift.model.gpt2 import NextTokenLoss
    from wikift.watch import hang, health

    forward, hang._SAMPLES, hang._KEPT_SAMPLES, health._LEAST_SECONDS = NextTokenLoss.forward, 100, 100, 1.0

    def slow(self: Any, *inputs: Any) -> Any:
        time.sleep(0.05 * dist.get_rank())
        return forward(self, *inputs)

    NextTokenLoss.forward = slow  # type: ignore[method-assign]
    return main(line)


LATE = [
    Place("ddp", 2),
    *(pytest.param(Place(engine, 2), marks=SLOW) for engine in ("fsdp", "zero1", "zero2", "zero3")),
]


@pytest.mark.parametrize("place", LATE, ids=str)
def test_a_rank_that_sleeps_in_its_step_is_named(place: Place, tmp_path: Path) -> None:
    store, run = tiny_store(tmp_path / "store"), tmp_path / "run"
    words = line(place, store, run, per_device_train_batch_size=6, max_steps=80, save_steps=80, eval_steps=80)
    assert run_ranks(sleepy, 2, words) == [0, 0]
    messages = [row["message"] for row in metrics(run) if "is at work while others wait" in row.get("message", "")]
    assert messages
    assert {text[:6] for text in messages} == {"rank 1"}


@pytest.mark.parametrize("place", ENGINES, ids=str)
def test_a_rewind_leaves_out_the_blocks_up_to_the_poisoned_step(place: Place, tmp_path: Path) -> None:
    """At a learning rate at which nothing is learned, a step's loss tells which blocks it read."""
    store, run, whole = tiny_store(tmp_path / "store"), tmp_path / "run", tmp_path / "whole"
    slow = {"learning_rate": 1e-12, "lr_scheduler_type": "constant", "weight_decay": 0, "eval_steps": 4}
    assert train_all([line(Place("single", 1), store, whole, max_steps=11, **slow)]) == [0]
    words = [line(place, store, run, max_steps=last, **slow, on_nonfinite="rewind") for last in (8, 9)]
    assert run_ranks(poisoned_once, place.ranks, words, place.ranks - 1) == [["", ""]] * place.ranks
    events = [(row["step"], row["event"]) for row in metrics(run) if "event" in row]
    assert events == [(4, "rewind")]
    losses = {row["step"]: row["loss"] for row in metrics(whole)}
    logged = [row for row in metrics(run) if "event" not in row]
    assert [row["step"] for row in logged] == list(range(1, 10))
    for row in logged:  # step 6 was bad: 5 and 6 are left out, and by the resumed run too
        assert row["loss"] == pytest.approx(losses[row["step"] + 2 * (row["step"] > 4)], abs=1e-5)


def poisoned_once(lines: list[list[str]], sick: int) -> list[str]:
    return [poisoned(words, sick, kind) for words, kind in zip(lines, ("nan once", "none"), strict=True)]


def test_a_poisoned_batch_stops_the_run_by_default(tmp_path: Path) -> None:
    words = line(Place("single", 1), tiny_store(tmp_path / "store"), tmp_path / "run", logging_steps=4)
    (message,) = run_ranks(poisoned, 1, words, 0, "nan")
    assert "at step 8, the gradient of step 6 not finite" in message
    assert "--on-nonfinite skip" in message


def test_drifting_weights_are_told_at_the_next_validation(tmp_path: Path) -> None:
    store, run = tiny_store(tmp_path / "store"), tmp_path / "run"
    words = line(Place("ddp", 2), store, run, max_steps=8, save_steps=8, eval_steps=4)
    assert run_ranks(poisoned, 2, words, 1, "drift") == ["", ""]
    assert [(row["step"], row["event"]) for row in metrics(run) if "event" in row] == [(8, "drift")]
