"""The rank contract: engine and number of ranks place the work, they never change it.

    pytest tests/test_contract.py

Compared with the single process: losses, gradient norms, weights on every rank, final weights. A falling loss proves
nothing: two of the faults put in below end with a lower one.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.ranks import run_ranks
from tests.tiny import VOCABULARY, arguments, curve, tiny_store

STEPS, GLOBAL_BATCH, BLOCK = 6, 4, 8
SPLITS = [(1, 1, 4), (1, 4, 1), (1, 2, 2), (2, 1, 2), (2, 2, 1), (4, 1, 1)]  # ranks, micro-batch, accumulation
TOLERANCE = 1e-5


@dataclass
class Measured:
    losses: list[float]
    norms: list[float]
    weights: dict[str, np.ndarray]
    nll: float


def measure(micro: int, accumulation: int, fault: str = "", clip: float = 0.5, dropout: float = 0.0) -> Measured:
    """On one rank: six steps of a tiny GPT-2, the learning rate changing at each, with a deliberate fault or none."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from wikift.engines.base import Engine
    from wikift.engines.ddp import DDPEngine
    from wikift.engines.single import SingleEngine
    from wikift.optim import AdamSettings
    from wikift.world import seed, start_world

    world = start_world("cpu")
    torch.manual_seed(7)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 16, "vocab_size": VOCABULARY}
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    model = GPT2LMHeadModel(GPT2Config(**shape, **rates, bos_token_id=0, eos_token_id=0))
    # The gradient of a key's bias is zero in exact arithmetic (softmax does not see it), so what comes is rounding;
    # Adam makes whole steps of it unless epsilon lies above it.
    adam = AdamSettings(0.1, 0.9, 0.95, 1e-6, 0.0 if fault == "no clipping" else clip)
    engine: Engine
    local = SingleEngine(
        model, adam, accumulation=1 if fault == "not divided" else accumulation, precision="fp32", compile=False
    )
    engine = DDPEngine(local, world, BLOCK) if world.size > 1 else local
    data = torch.Generator().manual_seed(1)
    losses, norms = [], []
    for step in range(STEPS):
        batch = torch.randint(VOCABULARY, (GLOBAL_BATCH, BLOCK + 1), generator=data)
        mine = batch[: GLOBAL_BATCH // world.size] if fault == "same data" else batch[world.rank :: world.size]
        torch.manual_seed(seed(3, "dropout", step, world.rank))
        means = []
        for i, blocks in enumerate(mine.split(micro)):
            last = i == accumulation - 1
            with _broken_sync(engine, fault, last):
                means.append(engine.forward_backward(blocks, last=last))
        norms.append(float(engine.step(1e-3 * (step + 1))))
        losses.append(float(world.total(torch.stack(means).mean())) / world.size)
    inputs = torch.randint(VOCABULARY, (3, BLOCK + 1), generator=data)
    nll = engine.nll(inputs[:, :-1], inputs[:, 1:])
    return Measured(losses, norms, {n: p.detach().numpy() for n, p in model.named_parameters()}, float(nll))


@contextlib.contextmanager
def _broken_sync(engine: Any, fault: str, last: bool) -> Any:
    """Put one of STYLE.md's communication faults into the DDP engine's decision when to communicate."""
    if fault not in ("never sync", "flag after forward"):
        yield
        return
    ddp, decide = engine.ddp, engine.ddp.no_sync
    ddp.no_sync = contextlib.nullcontext  # the engine's own decision is taken away
    if fault == "never sync":
        ddp.require_backward_grad_sync = False
        yield
    else:  # the forward still sees what the micro-batch before it left behind
        hook = ddp.register_forward_hook(lambda *_: setattr(ddp, "require_backward_grad_sync", last))
        yield
        hook.remove()
    ddp.no_sync = decide


def assert_same(ranks: list[Measured], reference: Measured) -> None:
    """The contract. Each assertion catches faults that the others let pass."""
    for measured in ranks:
        assert measured.losses == pytest.approx(reference.losses, abs=TOLERANCE), "losses"
        assert measured.norms == pytest.approx(reference.norms, rel=TOLERANCE), "gradient norms"
        for name, weight in measured.weights.items():
            assert np.array_equal(weight, ranks[0].weights[name]), f"ranks drifted apart: {name}"
            assert np.abs(weight - reference.weights[name]).max() < TOLERANCE, f"final weights: {name}"
        assert measured.nll == pytest.approx(reference.nll, rel=TOLERANCE), "validation"


@pytest.fixture(scope="module")
def reference() -> Measured:
    (measured,) = run_ranks(measure, 1, GLOBAL_BATCH, 1)
    return measured


@pytest.mark.parametrize(("ranks", "micro", "accumulation"), SPLITS)
def test_any_split_of_the_global_batch_is_the_same_run(
    reference: Measured, ranks: int, micro: int, accumulation: int
) -> None:
    assert all(norm > 0.5 for norm in reference.norms), "clipping must be active, or a fault in it would not show"
    assert_same(run_ranks(measure, ranks, micro, accumulation), reference)


@pytest.mark.parametrize("clip", [0.0, 100.0])
def test_without_active_clipping_too(clip: float) -> None:
    (alone,) = run_ranks(measure, 1, GLOBAL_BATCH, 1, "", clip)
    assert_same(run_ranks(measure, 2, 1, 2, "", clip), alone)


@pytest.mark.parametrize(
    ("fault", "caught_by"),
    [
        ("flag after forward", "losses"),
        ("never sync", "losses"),
        ("same data", "losses"),
        ("not divided", "gradient norms"),
        ("no clipping", "losses"),
    ],
)
def test_a_fault_put_in_is_caught(reference: Measured, fault: str, caught_by: str) -> None:
    """STYLE.md's faults, each with accumulation 2 on two ranks."""
    with pytest.raises(AssertionError, match=caught_by):
        assert_same(run_ranks(measure, 2, 1, 2, fault), reference)


def test_drift_alone_is_caught(reference: Measured) -> None:
    measured = run_ranks(measure, 2, 2, 1)
    measured[1].weights["transformer.ln_f.bias"] = np.nextafter(measured[1].weights["transformer.ln_f.bias"], 1)
    with pytest.raises(AssertionError, match="drifted"):
        assert_same(measured, reference)


def test_dropout_repeats_bit_for_bit_and_differs_between_ranks() -> None:
    once, again = run_ranks(measure, 2, 2, 1, "", 0.5, 0.3), run_ranks(measure, 2, 2, 1, "", 0.5, 0.3)
    assert once[0].losses == again[0].losses
    assert once[0].norms == again[0].norms
    assert all(np.array_equal(w, again[0].weights[n]) for n, w in once[0].weights.items())
    masks = run_ranks(dropout_mask, 2)
    assert not np.array_equal(masks[0], masks[1])


def dropout_mask() -> np.ndarray:
    from wikift.world import seed, start_world

    torch.manual_seed(seed(3, "dropout", 0, start_world("cpu").rank))
    return torch.nn.functional.dropout(torch.ones(64)).numpy()


def nll_side_effects() -> dict[str, bool]:
    from wikift.engines.ddp import DDPEngine
    from wikift.engines.single import SingleEngine
    from wikift.model import model_from_config
    from wikift.optim import AdamSettings
    from wikift.world import start_world

    world = start_world("cpu")
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 16, "vocab_size": VOCABULARY}
    model = model_from_config({**shape, "bos_token_id": 0, "eos_token_id": 0})
    local = SingleEngine(model, AdamSettings(0, 0.9, 0.9, 1e-8, 1), accumulation=1, precision="fp32", compile=False)
    engine = DDPEngine(local, world, BLOCK) if world.size > 1 else local
    blocks = torch.randint(VOCABULARY, (2, BLOCK + 1), generator=torch.Generator().manual_seed(5))
    state = torch.get_rng_state()
    first = engine.nll(blocks[:, :-1], blocks[:, 1:])
    second = engine.nll(blocks[:, :-1], blocks[:, 1:])
    nothing = engine.nll(blocks[:, :-1], torch.full_like(blocks[:, 1:], -100))
    halves = sum(float(engine.nll(b[:, :-1], b[:, 1:])) for b in blocks.split(1))
    return {
        "no dropout": float(first) == float(second),
        "nothing scored is exactly 0": float(nothing) == 0.0,
        "a sum over windows": abs(halves - float(first)) < 1e-4,
        "no gradient": all(p.grad is None for p in model.parameters()),
        "mode left as it was": model.training,
        "no random number drawn": torch.equal(state, torch.get_rng_state()),
    }


@pytest.mark.parametrize("ranks", [1, 2])
def test_validation_leaves_no_trace(ranks: int) -> None:
    for effects in run_ranks(nll_side_effects, ranks):
        assert all(effects.values()), effects


def plain_loop(folder: str, steps: list[tuple[list[torch.Tensor], float]]) -> list[tuple[float, float]]:
    """What a careful user would write with stock parts: two micro-batches a step."""
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder).train()
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups: list[dict[str, Any]] = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
    history = []
    for micro_batches, lr in steps:
        total = 0.0
        for blocks in micro_batches:
            logits = model(blocks[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten())
            (loss / len(micro_batches)).backward()
            total += loss.item() / len(micro_batches)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        history.append((total, float(norm)))
    return history


def save_stock_model(folder: str) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(11)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 16, "vocab_size": VOCABULARY}
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    GPT2LMHeadModel(GPT2Config(**shape, **rates, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)


def train(command_line: list[str]) -> int:
    from wikift.train import main

    return main(command_line)


def test_equal_to_a_plain_loop_on_one_and_two_ranks(tmp_path: Path) -> None:
    from wikift.batches import micro_batches
    from wikift.optim import Schedule
    from wikift.tokens import open_store

    store, model = tiny_store(tmp_path / "store"), tmp_path / "model"
    run_ranks(save_stock_model, 1, str(model))
    words = {"from_scratch": None, "config_overrides": None, "model": model}
    words |= {"max_steps": 20, "weight_decay": 0.1, "learning_rate": 1e-3}
    for ranks in (1, 2):
        line = arguments(store, tmp_path / f"run{ranks}", **words, per_device_train_batch_size=4 // ranks)
        assert run_ranks(train, ranks, line) == [0] * ranks
    stream = micro_batches(
        open_store(store).tokens("train"), np.arange(51), block_size=8, micro_batch=4, accumulation=2, rank=0, ranks=1,
        run_seed=42, first_step=0,
    )  # fmt: skip
    schedule = Schedule("linear", 1e-3, 0, 20)
    steps = [(next(stream), schedule.lr_at(step)) for step in range(1, 21)]
    (expected,) = run_ranks(plain_loop, 1, str(model), steps)
    for ranks in (1, 2):
        got = curve(tmp_path / f"run{ranks}")
        assert [row[1] for row in got] == pytest.approx([loss for loss, _ in expected], abs=TOLERANCE)
        assert [row[2] for row in got] == pytest.approx([norm for _, norm in expected], rel=TOLERANCE)
