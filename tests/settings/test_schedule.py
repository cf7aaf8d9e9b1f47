"""The learning rate of every update is transformers'. Run: pytest tests/settings/test_schedule.py"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import get_scheduler

from wikift.settings.schedule import Schedule

KINDS = ["linear", "cosine", "constant"]


@settings(max_examples=90, deadline=None)
@given(kind=st.sampled_from(KINDS), steps=st.integers(1, 120), data=st.data())
def test_the_learning_rate_is_transformers(kind: str, steps: int, data: st.DataObject) -> None:
    """Every update of a whole run, each asked for by itself."""
    warmup = data.draw(st.integers(0, steps - 1))
    ours = Schedule(kind, 3e-4, warmup, steps)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-4)
    name = "constant_with_warmup" if kind == "constant" else kind
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    for step in range(1, steps + 1):
        assert ours.lr_at(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12, abs=1e-18)
        optimizer.step()
        theirs.step()


def test_the_learning_rate_by_hand() -> None:
    linear = Schedule("linear", 1.0, 2, 6)
    assert [linear.lr_at(step) for step in range(1, 8)] == [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert Schedule("cosine", 1.0, 0, 4).lr_at(3) == pytest.approx(0.5)
    assert [Schedule("constant", 1.0, 1, 9).lr_at(step) for step in (1, 2, 9)] == [0.0, 1.0, 1.0]
    assert Schedule("cosine", 1.0, 0, 1).lr_at(1) == Schedule("linear", 1.0, 0, 1).lr_at(1) == 1.0
