"""What a GPU is asked to do, without one: nothing is left on the CPU, nothing waits for a number, little is held.

pytest tests/engines/test_gpu_path.py
"""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from tests.engines.test_build import WORK
from tests.fake_device import NAME, Held, without_numbers
from tests.ranks import each, run_ranks
from tests.tiny_engines import ADAM, tiny_config
from wikift.base.errors import UserError
from wikift.base.shape import Shape
from wikift.engines.base import Choice, Compute
from wikift.engines.memory import training_bytes
from wikift.engines.single import SingleEngine
from wikift.generation.decoder import Decoder
from wikift.kernels.loss import summed_loss
from wikift.model.gpt2 import make_model, model_config, resolve_precision

VOCABULARY = 50257


def trained(precision: str, checkpointing: bool) -> set[str]:
    """Two steps of two micro-batches, a validation and a sample; where what they gave is."""
    config = tiny_config(dropout=0.1)
    config.pad_token_id = 0
    given = torch.zeros(4, 9, dtype=torch.int64)
    mask = torch.ones(4, 9, dtype=torch.int64)
    with torch.device("meta"):
        model = make_model(config, gradient_checkpointing=checkpointing)
    with without_numbers() as device:
        engine = SingleEngine(model, ADAM, device, Compute(2, precision))
        found: list[torch.Tensor] = []
        for _ in range(2):
            found += [engine.forward_backward(given, last=last) for last in (False, True)]
            found.append(engine.step(1e-3))
        found += [engine.nll(given[:, :-1], given[:, 1:]), engine.next_logits(given, mask, mask)]
        return {tensor.device.type for tensor in [*found, *model.parameters()]}


def test_training_waits_for_no_number() -> None:
    """Not for a model with a pad_token_id either, for which transformers looks at each batch's ids."""
    cases = [(precision, checkpointing) for precision in ("fp32", "bf16", "fp16") for checkpointing in (False, True)]
    assert run_ranks(each, 1, trained, cases) == [[{NAME}] * 6]


@pytest.mark.parametrize(("capability", "taken"), [((9, 0), "tf32"), ((7, 5), "none")])
def test_tf32_is_fp32_rounded_by_gpus_that_can(
    capability: tuple[int, int], taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: capability >= (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    if taken == "none":
        with pytest.raises(UserError, match="--precision tf32: a GPU has no TF32, GPUs from NVIDIA's Ampere on"):
            resolve_precision("tf32", torch.device("cuda"))
    else:
        assert resolve_precision("tf32", torch.device("cuda")).name == "fp32"
    try:
        assert torch.backends.cuda.matmul.fp32_precision == taken
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"


def waits_of_deepspeed(stage: int) -> int:
    """How often DeepSpeed waits for the device in two steps of two micro-batches and a validation."""
    from deepspeed.accelerator import get_accelerator

    from tests.tiny_engines import make_engine, random_start
    from wikift.base.world import join_group, start_world

    waits = []
    get_accelerator().synchronize = lambda *given: waits.append(given)
    world, config = start_world("cpu"), tiny_config()
    join_group(world)
    engine = make_engine(f"zero{stage}", world, config, accumulation=2)
    engine.restore(random_start(config))
    given = torch.zeros(1, 9, dtype=torch.int64)
    waits.clear()
    for _ in range(2):
        for last in (False, True):
            engine.forward_backward(given, last=last)
        engine.step(1e-3)
    engine.nll(given[:, :-1], given[:, 1:])
    return len(waits)


def test_deepspeed_waits_for_no_device() -> None:
    """Its meter of throughput did, twice a micro-batch; the norm of a step is still waited for (engines/zero.py)."""
    assert run_ranks(each, 1, waits_of_deepspeed, [(1,), (2,), (3,)]) == [[0, 0, 0]]


def written(dtype: torch.dtype) -> set[str]:
    """Three rows of a batch, one token each, then two of them; where the logits are."""
    with torch.device("meta"):
        model = make_model(tiny_config()).to(dtype)
    with without_numbers() as device, torch.inference_mode():
        model.to_empty(device=device)
        decoder = Decoder(model)
        found = [decoder.begin([[1, 2, 3], [4, 5], [6]], 8), decoder.advance([7, 8, 9])]
        decoder.keep([1, 2])
        found.append(decoder.advance([10, 11]))
        return {logits.device.type for logits in found}


def test_a_token_waits_for_no_number() -> None:
    assert run_ranks(each, 1, written, [(torch.float32,), (torch.bfloat16,)]) == [[{NAME}] * 2]


def held_by_head(positions: int, graded: bool) -> float:
    """Bytes that the head of GPT-2 and its loss hold at most, less what they are given and give."""
    with without_numbers() as device, torch.set_grad_enabled(graded), torch.autocast(NAME, torch.bfloat16):
        hidden = torch.zeros(positions, 768, device=device, requires_grad=graded)
        weight = torch.zeros(VOCABULARY, 768, device=device, requires_grad=graded)
        targets = torch.zeros(positions, dtype=torch.int64, device=device)
        with Held() as held:
            loss = summed_loss(hidden, weight, targets)
            if graded:
                loss.backward()
        given_back = sum(4 * tensor.numel() for tensor in (hidden, weight)) if graded else 0
        return held.most - given_back


def test_the_head_holds_the_logits_of_some_positions_only() -> None:
    logits = 4096 * VOCABULARY
    for graded in (True, False):
        ((few, many),) = run_ranks(each, 1, held_by_head, [(4096, graded), (32768, graded)])
        assert few < 1.1 * (2 + 4 + 4) * logits  # in bf16, and two tensors in fp32 while one is made from the other
        assert many - few < 4 * 32768 * 768 * 4  # `hidden` and its gradient, in two types; whole logits would be 14 GB


class Case(NamedTuple):
    """What is trained."""

    shape: Shape
    micro_batch: int
    precision: str
    checkpointing: bool = False


def held_by_steps(case: Case) -> int:
    """Bytes that two steps of two micro-batches hold at most, state included."""
    shape = case.shape
    config = model_config({**dataclasses.asdict(shape), "bos_token_id": 0, "eos_token_id": 0})
    with torch.device("meta"):
        model = make_model(config, gradient_checkpointing=case.checkpointing)
    blocks = torch.zeros(case.micro_batch, shape.n_positions + 1, dtype=torch.int64)
    with without_numbers() as device, Held() as held:
        engine = SingleEngine(model, ADAM, device, Compute(2, case.precision))
        for last in (False, True, False, True):
            engine.forward_backward(blocks, last=last)
            if last:
                engine.step(1e-3)
    return held.most


CASES = [
    Case(Shape(n_layer=6), 4, "bf16"),
    Case(Shape(n_layer=6), 32, "bf16"),
    Case(Shape(n_layer=6), 32, "bf16", checkpointing=True),
    Case(Shape(n_layer=6), 8, "fp16"),
    Case(Shape(n_layer=6), 32, "fp32"),
    Case(Shape(n_layer=6), 32, "fp32", checkpointing=True),
    Case(Shape(n_layer=24, n_head=25, n_embd=1600), 2, "bf16"),  # half of gpt2-xl
]


def test_the_estimate_is_what_is_held() -> None:
    """The estimate that --engine auto decides by."""
    (measured,) = run_ranks(each, 1, held_by_steps, [(case,) for case in CASES], timeout_seconds=240)
    for case, held in zip(CASES, measured, strict=True):
        work = replace(
            WORK, engine=Choice("single", ""), block_size=1024, shape=case.shape, micro_batch=case.micro_batch,
            precision=case.precision, gradient_checkpointing=case.checkpointing,
        )  # fmt: skip
        assert held == pytest.approx(training_bytes(work, 1, gpu=32 << 30), rel=0.1), case
