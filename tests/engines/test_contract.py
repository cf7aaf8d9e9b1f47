"""The rank contract: engine and number of ranks place the work, they never change it.

Compared with the single process: losses, gradient norms, weights on every rank, final weights. A falling loss proves
nothing: two of the faults put in below end with a lower one.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.ranks import each, run_ranks
from tests.tiny import VOCABULARY, arguments, curve, tiny_store, train
from tests.tiny_engines import ADAM, BLOCK, ENGINES, make_engine, random_start, tiny_config
from wikift.engines.optim import LossScale, ScaleRule

STEPS, GLOBAL_BATCH = 6, 4
TOLERANCE = 1e-5
FAULTS = ("flag after forward", "never sync", "same data", "not divided", "no clipping", "decay everywhere", "one rate")
DROPOUT = {"fault": "same data", "dropout": 0.3, "micro": 2, "accumulation": 1}


@dataclass
class Measured:
    losses: list[float]
    norms: list[float]
    weights: dict[str, np.ndarray]  # whole tensors, as this rank sees them
    nll: float
    own: list[float]  # this rank's losses


def measure(
    kind: str,
    micro: int,
    accumulation: int,
    fault: str = "",
    clip: float = 0.5,
    dropout: float = 0.0,
    precision: str = "fp32",
    **options: Any,
) -> Measured:
    """On one rank: six steps of a tiny GPT-2, the learning rate changing at each, with a deliberate fault or none."""
    from wikift.base.world import seed, start_world

    world = start_world("cpu")
    config = tiny_config(dropout)
    adam = replace(ADAM, max_grad_norm=0.0 if fault == "no clipping" else clip)
    engine: Any = make_engine(
        kind, world, config, micro=micro, accumulation=accumulation, precision=precision, adam=adam, **options
    )
    engine.restore(random_start(config))
    break_engine(engine, fault, accumulation)
    if precision == "fp16":  # so high that it overflows at once, and grows back soon
        set_scale(engine, ScaleRule(initial=2.0**20, window=2))
    data = torch.Generator().manual_seed(1)
    check_one_head(engine)
    losses, norms, own = [], [], []
    for step in range(STEPS):
        batch = torch.randint(VOCABULARY, (GLOBAL_BATCH, BLOCK + 1), generator=data)
        mine = batch[: GLOBAL_BATCH // world.size] if fault == "same data" else batch[world.rank :: world.size]
        torch.manual_seed(seed(3, "dropout", step, world.rank))
        means = []
        for i, blocks in enumerate(mine.split(micro)):
            last = i == accumulation - 1
            with broken_micro_batch(engine, fault, last):
                means.append(engine.forward_backward(blocks, last=last))
        norms.append(float(engine.step(1e-3 if fault == "one rate" else 1e-3 * (step + 1))))
        own.append(float(torch.stack(means).mean()))
        losses.append(float(world.total(torch.stack(means).mean())) / world.size)
    check_one_head(engine)
    inputs = torch.randint(VOCABULARY, (3, BLOCK + 1), generator=data)
    nll = float(engine.nll(inputs[:, :-1], inputs[:, 1:]))
    return Measured(losses, norms, whole_weights(engine, kind), nll, own)


@contextlib.contextmanager
def broken_micro_batch(engine: Any, fault: str, last: bool) -> Iterator[None]:
    """Put one of STYLE.md's communication faults into one micro-batch."""
    if fault not in ("never sync", "flag after forward"):
        yield
    elif hasattr(engine, "ddp"):
        yield from broken_ddp(engine, fault, last)
    elif hasattr(engine, "reshard"):
        assert fault == "never sync"
        decide = engine.losses.set_requires_gradient_sync
        engine.losses.set_requires_gradient_sync = lambda wanted: decide(False)
        yield
        del engine.losses.set_requires_gradient_sync
    else:
        import deepspeed

        assert fault == "never sync"
        with pytest.MonkeyPatch.context() as patch:
            for name in ("all_reduce", "reduce"):  # ZeRO-1 and -2 divide by the ranks first, then sum
                patch.setattr(
                    deepspeed.comm, name, lambda tensor, *_, **__: tensor.mul_(deepspeed.comm.get_world_size())
                )
            patch.setattr(deepspeed.runtime.zero.stage3, "reduce_scatter_coalesced", own_parts)
            yield


def own_parts(tensors: Any, group: Any = None, **_: Any) -> list[torch.Tensor]:
    """A reduce-scatter that takes this rank's own gradient for everybody's."""
    import deepspeed

    ranks, rank = deepspeed.comm.get_world_size(), deepspeed.comm.get_rank()
    parts = []
    for tensor in tensors:
        size = -(-tensor.numel() // ranks)
        padded = torch.nn.functional.pad(tensor.flatten(), (0, size * ranks - tensor.numel()))
        parts.append(padded[rank * size : (rank + 1) * size].clone())
    return parts


def broken_ddp(engine: Any, fault: str, last: bool) -> Iterator[None]:
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


def break_engine(engine: Any, fault: str, accumulation: int) -> None:
    """Faults that lie in the engine as a whole."""
    inner = engine.local if hasattr(engine, "ddp") else engine
    if fault == "not divided" and hasattr(engine, "stage"):
        backward = engine.engine.backward
        engine.engine.backward = lambda loss: backward(loss * accumulation)
    elif fault == "not divided":
        inner.work = replace(inner.work, accumulation=1)
    elif fault == "stock loss":
        inner.losses.forward = partial(stock_loss, inner.model)
    elif fault == "decay everywhere":
        for group in inner.optimizer.param_groups:
            group["weight_decay"] = ADAM.weight_decay


def stock_loss(model: Any, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """transformers' forward in bf16 and its loss of the whole logits, summed."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=inputs, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")


def check_one_head(engine: Any) -> None:
    """After sharding, after restoring and after training: one tensor in both places, and a parameter once."""
    model = engine.local.model if hasattr(engine, "ddp") else engine.model
    assert model.lm_head.weight is model.transformer.wte.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


def set_scale(engine: Any, rule: ScaleRule) -> None:
    inner = engine.local if hasattr(engine, "ddp") else engine
    inner.loss_scale = LossScale(rule, inner.loss_scale.scale.device, inner.loss_scale.ranks)


def whole_weights(engine: Any, kind: str) -> dict[str, np.ndarray]:
    """Every weight as this rank computes with it (gathered from the shards where an engine has no whole one)."""
    if kind in ("single", "ddp"):
        model = engine.model if kind == "single" else engine.local.model
        return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    if kind == "fsdp":
        return {name: p.full_tensor().detach().numpy().copy() for name, p in engine.model.named_parameters()}
    if kind == "zero3":
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(engine.model.parameters())):
            return {name: p.detach().float().numpy().copy() for name, p in engine.model.named_parameters()}
    return {name: p.detach().float().numpy().copy() for name, p in engine.model.named_parameters()}


def assert_same(ranks: list[Measured], reference: Measured, tolerance: float = TOLERANCE) -> None:
    """The contract. Each assertion catches faults that the others let pass."""
    for measured in ranks:
        assert measured.losses == pytest.approx(reference.losses, abs=tolerance), "losses"
        assert measured.norms == pytest.approx(reference.norms, rel=tolerance), "gradient norms"
        for name, weight in measured.weights.items():
            assert np.array_equal(weight, ranks[0].weights[name]), f"ranks drifted apart: {name}"
            assert np.abs(weight - reference.weights[name]).max() < tolerance, f"final weights: {name}"
        assert measured.nll == pytest.approx(reference.nll, rel=tolerance), "validation"


@pytest.fixture(scope="module")
def reference() -> Measured:
    (measured,) = run_ranks(measure, 1, "single", GLOBAL_BATCH, 1)
    return measured


# What is measured of every engine on two ranks, all of it in one launch: the arguments of `measure`
ON_TWO: dict[str, dict[str, Any]] = {
    "as it is": {},
    "larger micro-batch": {"micro": 2, "accumulation": 1},
    "never clipped": {"clip": 0.0},
    "rarely clipped": {"clip": 100.0},
    **{fault: {"fault": fault} for fault in FAULTS},
    "dropout": DROPOUT,
    "dropout again": DROPOUT,
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
}


def measure_each(kind: str, cases: dict[str, dict[str, Any]]) -> dict[str, Measured | str]:
    """Each of `cases` on this rank, or the error that all ranks raise."""
    results: dict[str, Measured | str] = {}
    for name, words in cases.items():
        try:
            results[name] = measure(kind, **{"micro": 1, "accumulation": 2, **words})
        except AssertionError:
            results[name] = traceback.format_exc()
    return results


def norms_of_repeats(kind: str) -> list[float]:
    """The gradient's norm of one micro-batch in bf16, alone and 64 times over."""
    from wikift.base.world import start_world

    world, config, norms = start_world("cpu"), tiny_config(), []
    blocks = torch.randint(VOCABULARY, (1, BLOCK + 1), generator=torch.Generator().manual_seed(world.rank))
    for times in (1, 64):
        engine = make_engine(kind, world, config, accumulation=times, precision="bf16")
        engine.restore(random_start(config))
        for number in range(times):
            engine.forward_backward(blocks, last=number == times - 1)
        norms.append(float(engine.step(1e-3)))
    return norms


def measure_all(kind: str, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {**measure_each(kind, cases), "validation": nll_side_effects(kind), "repeats": norms_of_repeats(kind)}


@functools.cache
def on_two_ranks(kind: str) -> list[dict[str, Any]]:
    cases = {name: words for name, words in ON_TWO.items() if kind == "ddp" or name != "flag after forward"}
    if kind == "fsdp":
        cases |= {"reshard off": {"reshard": False}, "checkpointing": {"checkpointing": True}}
    return run_ranks(measure_all, 2, kind, cases, timeout_seconds=300)


def of_case(kind: str, name: str) -> list[Any]:
    return [results[name] for results in on_two_ranks(kind)]


@functools.cache
def single(**words: Any) -> Measured:
    (measured,) = run_ranks(measure_each, 1, "single", {"": {"micro": 4, "accumulation": 1, **words}})
    return measured[""]  # type: ignore[no-any-return]


def test_accumulation_alone_is_the_same_run(reference: Measured) -> None:
    assert all(norm > 0.5 for norm in reference.norms), "clipping must be active, or a fault in it would not show"
    for micro, accumulation in ((1, 4), (2, 2)):
        assert_same([single(micro=micro, accumulation=accumulation)], reference)


@pytest.mark.parametrize("kind", ENGINES[1:])
def test_any_engine_and_split_is_the_same_run(reference: Measured, kind: str) -> None:
    for name in ("as it is", "larger micro-batch", *(("reshard off", "checkpointing") if kind == "fsdp" else ())):
        assert_same(of_case(kind, name), reference)
    for name, clip in (("never clipped", 0.0), ("rarely clipped", 100.0)):
        assert_same(of_case(kind, name), single(clip=clip))
    assert_same(run_ranks(measure, 4, kind, 1, 1), reference)
    if kind not in ("ddp", "zero2"):
        assert_same(run_ranks(measure, 1, kind, 2, 2), reference)


# only DDP decides in the forward
PAIRS = [(kind, fault) for kind in ENGINES[1:] for fault in FAULTS if kind == "ddp" or fault != "flag after forward"]


@pytest.mark.parametrize(("kind", "fault"), PAIRS)
def test_a_fault_put_in_is_caught(reference: Measured, kind: str, fault: str) -> None:
    """Faults of communication and two more, on two ranks; docs/explanation/correctness.md has a table."""
    measured = of_case(kind, fault)
    if isinstance(measured[0], str):
        assert (kind, fault) == ("fsdp", "never sync")
        assert all("DTensor" in error for error in measured)
        return
    with pytest.raises(AssertionError, match="gradient norms" if fault == "not divided" else "losses"):
        assert_same(measured, reference)


def test_drift_alone_is_caught(reference: Measured) -> None:
    measured = copy.deepcopy(of_case("ddp", "as it is"))
    measured[1].weights["transformer.ln_f.bias"] = np.nextafter(measured[1].weights["transformer.ln_f.bias"], 1)
    with pytest.raises(AssertionError, match="drifted"):
        assert_same(measured, reference)


@pytest.mark.parametrize("kind", ENGINES[1:])
def test_dropout_repeats_bit_for_bit_and_differs_between_ranks(kind: str) -> None:
    """Every rank reads the same blocks here, so that only its masks can make its losses its own."""
    once, again = of_case(kind, "dropout"), of_case(kind, "dropout again")
    assert once[0].losses == again[0].losses
    assert once[0].norms == again[0].norms
    assert all(np.array_equal(w, again[0].weights[n]) for n, w in once[0].weights.items())
    assert once[0].own[0] != once[1].own[0]


def residual(kind: str, dtype: str) -> tuple[set[torch.dtype], float]:
    """The types of what the blocks return, and the loss of a micro-batch, with matmuls in bf16."""
    from wikift.base.world import join_group, start_world

    world, config = start_world("cpu"), tiny_config()
    join_group(world)
    engine: Any = make_engine(kind, world, config, precision="bf16", residual_dtype=dtype)
    engine.restore(random_start(config))
    types = set[torch.dtype]()
    for block in (engine.local if kind == "ddp" else engine).model.transformer.h:
        block.register_forward_hook(lambda module, inputs, output: types.add(output.dtype))
    loss = engine.forward_backward(torch.arange(BLOCK + 1)[None], last=True)
    return types, float(loss)


def test_the_residual_is_rounded_where_it_is_asked_for() -> None:
    """Under every engine, whatever it holds the weights in."""
    kinds = ["single", "ddp", "fsdp", "zero2", "zero3"]
    (found,) = run_ranks(each, 1, residual, [(kind, dtype) for kind in kinds for dtype in ("fp32", "bf16")])
    assert [types for types, _ in found] == [{torch.float32}, {torch.bfloat16}] * len(kinds)
    losses = [loss for _, loss in found]
    assert all(
        wide != low == pytest.approx(wide, rel=0.01) for wide, low in zip(losses[::2], losses[1::2], strict=True)
    )


def test_bf16_under_every_engine_is_as_near_to_fp32_as_hugging_faces_own(reference: Measured) -> None:
    """The bound is measured: how far from fp32 transformers' forward in bf16 comes, worst of three orders of summation.

    Rounding to 8 bits makes errors that another order of summation draws anew, so an engine that computes the same
    thing in another order lies as far from fp32 as that, give or take a factor of two for the luck of the draw and for
    what sharded engines round beside the products: embeddings and LayerNorm gains are gathered in bf16.
    """
    splits = [{"micro": micro, "accumulation": 4 // micro, "precision": "bf16"} for micro in (4, 2, 1)]
    cases = {
        f"{name} {number}": {**split, "fault": name}
        for number, split in enumerate(splits)
        for name in ("stock loss", "")
    }
    (alone,) = run_ranks(measure_each, 1, "single", cases)
    stock = [distances(measured, reference) for name, measured in alone.items() if name.startswith("stock")]
    bounds = [2 * max(column) for column in zip(*stock, strict=True)]
    runs = [("single", measured) for name, measured in alone.items() if name.startswith(" ")]
    runs += [(kind, measured) for kind in ENGINES[1:] for measured in of_case(kind, "bf16")]
    for kind, measured in runs:
        for what, distance, bound in zip(
            ("loss", "norm", "weights"), distances(measured, reference), bounds, strict=True
        ):
            assert distance <= bound, (kind, what)


@pytest.mark.parametrize("kind", ENGINES[1:])
def test_micro_batches_in_bf16_are_added_up_in_fp32(kind: str) -> None:
    """The mean of equal gradients is each of them; a sum in bf16 rounds each addition to 8 bits."""
    for alone, repeated in of_case(kind, "repeats"):
        assert repeated == pytest.approx(alone, rel=1e-5)


def distances(measured: Measured, reference: Measured) -> tuple[float, float, float]:
    """Of losses, relative of norms, and the mean over all weights."""
    weights = np.concatenate([np.abs(w - reference.weights[n]).ravel() for n, w in measured.weights.items()])
    norms = [abs(a / b - 1) for a, b in zip(measured.norms, reference.norms, strict=True)]
    return float(np.abs(np.subtract(measured.losses, reference.losses)).max()), max(norms), float(weights.mean())


def test_fp16_skips_the_same_steps_under_every_engine() -> None:
    alone = single(micro=1, accumulation=4, precision="fp16")
    skipped = [not np.isfinite(norm) for norm in alone.norms]
    assert skipped[0], "the scale is meant to overflow at first"
    assert not all(skipped)
    for kind in ENGINES[1:]:
        for measured in of_case(kind, "fp16"):
            assert [not np.isfinite(norm) for norm in measured.norms] == skipped, kind


def nll_side_effects(kind: str) -> dict[str, bool]:
    from wikift.base.world import start_world

    world = start_world("cpu")
    config = tiny_config(dropout=0.1)
    engine: Any = make_engine(kind, world, config)
    engine.restore(random_start(config))
    model = engine.local.model if kind == "ddp" else engine.model
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
        "mode left as it was": all(module.training for module in model.modules()),
        "no random number drawn": torch.equal(state, torch.get_rng_state()),
    }


@pytest.mark.parametrize("kind", ENGINES)
def test_validation_leaves_no_trace(kind: str) -> None:
    for effects in run_ranks(nll_side_effects, 1, kind) if kind == "single" else of_case(kind, "validation"):
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


def test_equal_to_a_plain_loop_on_one_and_two_ranks(tmp_path: Path) -> None:
    from wikift.data.batches import BatchLayout, micro_batches
    from wikift.data.store import open_store
    from wikift.settings.schedule import Schedule

    store, model = tiny_store(tmp_path / "store"), tmp_path / "model"
    run_ranks(save_stock_model, 1, str(model))
    words = {"from_scratch": None, "config_overrides": None, "model": model}
    words |= {"max_steps": 20, "weight_decay": 0.1, "learning_rate": 1e-3}
    for ranks in (1, 2):
        line = arguments(store, tmp_path / f"run{ranks}", **words, per_device_train_batch_size=4 // ranks)
        assert run_ranks(train, ranks, line) == [0] * ranks
    stream = micro_batches(open_store(store).tokens("train"), np.arange(51), BatchLayout(8, 4, 2), run_seed=42)
    schedule = Schedule("linear", 1e-3, 0, 20)
    steps = [(next(stream), schedule.lr_at(step)) for step in range(1, 21)]
    (expected,) = run_ranks(plain_loop, 1, str(model), steps)
    for ranks in (1, 2):
        got = curve(tmp_path / f"run{ranks}")
        assert [row[1] for row in got] == pytest.approx([loss for loss, _ in expected], abs=TOLERANCE)
        assert [row[2] for row in got] == pytest.approx([norm for _, norm in expected], rel=TOLERANCE)
