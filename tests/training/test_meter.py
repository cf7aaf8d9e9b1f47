"""Time left, by a clock of the test's. Run: pytest tests/training/test_meter.py"""

from __future__ import annotations

import pytest
import torch

from wikift.base.shape import released_shape
from wikift.training.meter import Meter, few_tokens


def test_the_time_left_counts_validations_and_saves() -> None:
    now = 0.0
    meter = Meter(torch.device("cpu"), 1.0, None, lambda: now, eval_tokens=600)

    def steps(count: int, seconds: float) -> None:
        nonlocal now
        for _ in range(count):
            now += seconds
            meter.step(100)

    steps(2, 5.0)  # 20 tokens a second: a validation of 600, forward only, may take 10 s
    rows = [[3.0, 1.5, 0.0, 5.0, 0.4], [4.0, 2.5, 0.5, 6.0, 0.4]]  # each rank's loss, memory, wait, matmul and work
    assert meter.reading(10, 3, rows[:1])["seconds_left"] == pytest.approx(10 * 5 + 3 * 10)
    with meter.paused(True):
        now += 9.0
        meter.restart()  # a line is written after the validation, before the save
        now += 7.0
    with meter.paused(False):  # nothing was due
        pass
    steps(4, 5.0)
    reading = meter.reading(6, 2, rows)
    assert (reading["loss"], reading["memory_gb"], reading["ranks"]["data_wait"]) == (3.5, 1.5, [0.0, 0.5])
    assert meter.reading(6, 2, rows) == reading, "a look at the numbers between two log lines changes nothing"
    assert reading["seconds_left"] == pytest.approx(6 * 5 + 2 * 16)
    assert reading["tokens_per_second"] == pytest.approx(20)


def test_too_few_tokens_per_gpu_are_told_with_numbers() -> None:
    gpt2 = released_shape("gpt2")
    assert gpt2 is not None
    assert not list(few_tokens(16_384, gpt2, 1024, 4))
    (text,) = few_tokens(8192, gpt2, 1024, 4)
    assert "8,192 tokens per GPU and step, below 16,384" in text
    assert "7.0 TFLOP for 497.8 MB of gradients" in text
