"""Parts of the program on a pretended GPU: nothing waits for a number, and no more is held than is forecast.

pytest tests/cuda/test_parts.py
"""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from tests.cuda.pretended import pretended
from tests.cuda.stand_ins import DEVICE, MEMORY
from tests.engines.test_build import WORK
from tests.ranks import each, run_ranks
from tests.tiny_engines import make_engine, tiny_config
from wikift.base.errors import UserError
from wikift.base.shape import Shape
from wikift.base.work import Choice, Work
from wikift.engines.build import construct
from wikift.engines.memory import training_bytes
from wikift.generation.decoder import Decoder
from wikift.kernels.loss import summed_loss
from wikift.model.gpt2 import make_model, resolve_precision
from wikift.settings import deepspeed

VOCABULARY = 50257


class Zeros:
    """A FragmentReader of zeros."""

    def read(self, name: str, state: str, start: int, stop: int) -> torch.Tensor:
        return torch.zeros(stop - start)


def trained(precision: str, checkpointing: bool) -> int:
    """How often a step of two micro-batches waits; with a pad_token_id, transformers would look."""
    config = tiny_config(dropout=0.1)
    config.pad_token_id = 0
    with pretended() as seen:
        from wikift.base.world import start_world

        engine = make_engine(
            "single", start_world("cuda"), config, accumulation=2, precision=precision, checkpointing=checkpointing
        )
        seen.begin("step")
        for last in (False, True):
            engine.forward_backward(torch.zeros(4, 9, dtype=torch.int64).pin_memory(), last=last)
        engine.step(1e-3)
        return seen.part.waits.total()


def test_no_precision_waits_for_a_number() -> None:
    cases = [(precision, checkpointing) for precision in ("fp32", "bf16", "fp16") for checkpointing in (False, True)]
    assert run_ranks(each, 1, trained, cases) == [[0] * 6]


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


def written(dtype: torch.dtype) -> int:
    """How often three rows of a batch, one token each, then two of them, wait for their logits."""
    with torch.device("meta"):
        model = make_model(tiny_config()).to(dtype)
    with pretended() as seen, torch.inference_mode():
        model.to_empty(device=DEVICE)
        decoder = Decoder(model)
        seen.begin("tokens")
        decoder.begin([[1, 2, 3], [4, 5], [6]], 8)
        decoder.advance([7, 8, 9])
        decoder.keep([1, 2])
        logits = decoder.advance([10, 11])
        assert logits.device == DEVICE
        return sum(n for (what, _), n in seen.part.waits.items() if what != "copy from the host")  # the tokens'


def test_a_token_waits_for_no_number() -> None:
    assert run_ranks(each, 1, written, [(torch.float32,), (torch.bfloat16,)]) == [[0, 0]]


def held_by_head(positions: int, graded: bool) -> float:
    """Bytes that the head of GPT-2 and its loss hold at most, less what they are given and give."""
    with pretended() as seen, torch.set_grad_enabled(graded), torch.autocast("cuda", torch.bfloat16):
        hidden = torch.zeros(positions, 768, device=DEVICE, requires_grad=graded)
        weight = torch.zeros(VOCABULARY, 768, device=DEVICE, requires_grad=graded)
        targets = torch.zeros(positions, dtype=torch.int64, device=DEVICE)
        before = seen.now
        seen.begin("head")
        loss = summed_loss(hidden, weight, targets)
        if graded:
            loss.backward()
        given_back = sum(4 * tensor.numel() for tensor in (hidden, weight)) if graded else 0
        return seen.part.most - before - given_back


def test_the_head_holds_the_logits_of_some_positions_only() -> None:
    for graded in (True, False):
        ((few, many),) = run_ranks(each, 1, held_by_head, [(8192, graded), (65536, graded)])
        assert few < 1.1 * (2 + 4 + 4) * 8192 * VOCABULARY  # in bf16, and two in fp32 while one is made of the other
        assert many - few < 4 * 65536 * 768 * 4  # `hidden` and its gradient, in two types; whole logits are 33 GB


class Case(NamedTuple):
    """What is trained: two layers of gpt2's width unless it says otherwise."""

    engine: str = "single"
    ranks: int = 1
    micro_batch: int = 8
    precision: str = "bf16"
    checkpointing: bool = False
    shape: Shape = Shape(n_layer=2)
    accumulation: int = 2
    residual: str = "fp32"


def work_of(case: Case) -> Work:
    kind = case.engine[:5] if case.engine.startswith("zero") else case.engine.split()[0]
    return replace(
        WORK,
        engine=Choice(kind, ""),
        block_size=1024,
        shape=case.shape,
        micro_batch=case.micro_batch,
        precision=case.precision,
        gradient_checkpointing=case.checkpointing,
        residual_dtype=case.residual,
        accumulation=case.accumulation,
        fsdp_reshard=case.engine != "fsdp whole",
        zero_config=deepspeed.read(case.engine)[0] if kind.startswith("zero") else {},
    )


def held_by_steps(case: Case) -> int:
    """Bytes that two steps hold at most, state included."""
    work = work_of(case)
    with pretended(ranks=case.ranks) as seen:
        from wikift.base.world import start_world

        config = deepspeed.engine_config(work.zero_config, work, case.ranks) if work.zero_config else {}
        shape = tiny_config(0.1, **dataclasses.asdict(case.shape))
        engine = construct(replace(work, zero_config=config), shape, start_world("cuda"), compile=False)
        engine.restore(Zeros())
        seen.begin("steps")
        for _ in range(2):
            for number in range(case.accumulation):
                blocks = torch.zeros(case.micro_batch, 1025, dtype=torch.int64).pin_memory()
                engine.forward_backward(blocks, last=number == case.accumulation - 1)
            engine.step(1e-3)
        return seen.part.most


ENGINES = ("ddp", "fsdp", "fsdp whole", "zero1", "zero2", "zero3")
FEW = [
    Case(),
    Case(checkpointing=True),
    Case(micro_batch=32, residual="bf16"),
    *(Case(engine, 8) for engine in ("ddp", "fsdp", "zero2")),
]
MORE = [Case(precision="fp32"), *(Case(engine, 8) for engine in ("fsdp whole", "zero1", "zero3"))]
MORE += [Case(engine, ranks, shape=Shape()) for engine in ENGINES for ranks in (8, 512)]
# minutes with more layers: DeepSpeed joins each tensor from the ranks' parts one by one, 512 operations
MORE[MORE.index(Case("zero3", 512, shape=Shape()))] = Case("zero3", 512, shape=Shape(n_layer=1))
MORE += [Case("zero2_offload", 8), Case("zero3_offload", 8), Case("zero3", 8, micro_batch=16)]
MORE += [Case(engine, ranks, precision="fp16") for engine, ranks in (("single", 1), ("fsdp", 8), ("zero2", 8))]
MORE += [Case("zero3", 8, micro_batch=2, shape=Shape(n_layer=6, n_head=25, n_embd=1600))]  # gpt2-xl's width
MORE += [Case(shape=Shape()), Case(micro_batch=2, shape=Shape(n_layer=24, n_head=25, n_embd=1600))]


@pytest.mark.parametrize("case", [*FEW, *(pytest.param(case, marks=pytest.mark.long) for case in MORE)], ids=str)
def test_the_forecast_is_what_is_held(case: Case) -> None:
    """The forecast that --engine auto decides by, and `wikift plan` shows."""
    held = run_ranks(held_by_steps, 1, case, timeout_seconds=400)[0]
    assert held == pytest.approx(training_bytes(work_of(case), case.ranks, gpu=MEMORY), rel=0.1), case
