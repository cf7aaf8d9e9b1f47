"""launch/train.py on pretended GPUs: what a step asks of the device, of the host and of the other ranks.

Each case resumes a run of one GPU, trains, validates, samples and saves; a tensor left on the CPU would end it.
"""

from __future__ import annotations

import math
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.cuda.program import line, steps, train
from tests.cuda.seen import SMALL, Part, totals
from tests.ranks import run_ranks
from tests.traffic import Size, exchanged
from tests.trained import text_store
from wikift.data.store import TokenStore

GLOBAL_BATCH = 1024  # blocks, so that 512 ranks have two micro-batches each
LAYERS, WIDTH, POSITIONS = 2, 768, 1024
# of a step of two micro-batches without a line of the log; DeepSpeed's own, and its norm (docs/reference/deepspeed.md)
WAITS = {"single": 0, "ddp": 0, "fsdp": 0, "fsdp whole": 0, "zero1": 8, "zero2": 9, "zero3": 7}
LAUNCHES = {"single": 423, "ddp": 451, "fsdp": 444, "fsdp whole": 451, "zero1": 636, "zero2": 636, "zero3": 616}
# FSDP2 and DeepSpeed on one rank take tensors one by one
LAUNCHES_ALONE = {**LAUNCHES, "fsdp": 579, "zero1": 1004, "zero2": 1016}


class Case(NamedTuple):
    kind: str
    ranks: int
    plain: bool = True  # else with --gradient-checkpointing and --deterministic, and no accumulation


FEW = [Case("single", 1), Case("single", 1, plain=False), *(Case(kind, 8) for kind in WAITS if kind != "single")]
MORE = [Case(kind, 512) for kind in WAITS if kind != "single"]
MORE += [Case(kind, 8, plain=False) for kind in WAITS if kind != "single"]
MORE += [Case(kind, 1) for kind in WAITS if kind not in ("single", "ddp", "fsdp whole")]
CASES = [*FEW, *(pytest.param(case, marks=pytest.mark.long) for case in MORE)]
SEVERAL = [case for case in CASES if (case if isinstance(case, Case) else case.values[0]).ranks > 1]
measured: dict[Case, list[list[Part]]] = {}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    folder = tmp_path_factory.mktemp("cuda")
    (folder / "prompts.txt").write_text("The Renaissance\n")
    return text_store(folder / "store", repeat=300)


@pytest.fixture(scope="module")
def start(store: TokenStore) -> Path:
    """A run of one GPU that has ended at step 2."""
    run = store.path.parent / "start"
    run_ranks(train, 1, 1, [words(Case("single", 1), store, run, max_steps=2)])
    return run


def words(case: Case, store: TokenStore, run: Path, **settings: Any) -> list[str]:
    kind, ranks, plain = case
    micro = GLOBAL_BATCH // ranks // (2 if plain else 1)
    more: dict[str, Any] = {} if plain else {"gradient_checkpointing": True, "deterministic": True}
    more |= {"block_size": 32, "global_batch_size": GLOBAL_BATCH, "per_device_train_batch_size": micro}
    return line(kind, store.path, run, sample_prompts=store.path.parent / "prompts.txt", **more, **settings)


@pytest.fixture
def step(case: Case, store: TokenStore, start: Path, tmp_path: Path) -> list[Part]:
    """The parts of a step after a validation, samples and a checkpoint, itself without any, nor a line of the log."""
    if case not in measured:
        shutil.copytree(start, tmp_path / "run", copy_function=os.link)
        every = {"logging_steps": 6, "save_steps": 6, "eval_steps": 6}
        line = words(case, store, tmp_path / "run", max_steps=8, **every)
        (parts,) = run_ranks(train, 1, case.ranks, [line], timeout_seconds=300)[0]
        measured[case] = steps(parts)
    _, _, before, full, plain, _ = measured[case]  # ZeRO-3 notes in two passes what it fetches, and compares notes
    assert sum(len(part.waits) for part in full) > 5, "the loss, the validation, samples and the checkpoint are read"
    gathers = ("zero3", "all_gather")  # what ZeRO-3 has gathered already for a sample, it gathers not again
    for one, other in zip(before, plain, strict=True):
        assert one.name == other.name
        assert other.waits <= one.waits if case.kind == "zero3" else other.waits == one.waits
        kept, again = ([c for c in p.collectives if (case.kind, c.name) != gathers] for p in (one, other))
        assert again == kept, "something is left behind"
    return plain


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_without_a_line_of_the_log_waits_for_no_device(case: Case, step: list[Part]) -> None:
    waits = sum((part.waits for part in step), Counter[tuple[str, str]]())
    assert waits.total() <= WAITS[case.kind], waits


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_launches_no_more_than_it_did(case: Case, step: list[Part]) -> None:
    if case.plain:
        most = LAUNCHES if case.ranks > 1 else LAUNCHES_ALONE
        assert sum(part.launches for part in step) <= most[case.kind]


def model_size(vocabulary: int, rows_of: int) -> Size:
    """Elements, where the rows of each tensor are padded to a multiple of `rows_of`."""
    rows = {WIDTH: 6, 3 * WIDTH: 1, 4 * WIDTH: 1}  # vectors of a block, by their length
    matrices = ((WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH))

    def padded(count: int) -> int:
        return math.ceil(count / rows_of) * rows_of

    block = sum(padded(count) * number for count, number in rows.items())
    block += sum(padded(count) * width for count, width in matrices)
    rest = padded(POSITIONS) * WIDTH + 2 * padded(WIDTH)
    return Size(LAYERS * block, LAYERS, padded(vocabulary) * WIDTH, rest)


@pytest.mark.parametrize("case", SEVERAL, ids=str)
def test_bytes_of_a_step_are_those_of_the_formula(case: Case, step: list[Part], store: TokenStore) -> None:
    """docs/explanation/scaling.md; DeepSpeed pads a little, and keeps some of stage 3's weights."""
    micro_batches = 2 if case.plain else 1
    model = model_size(store.vocab_size, case.ranks if case.kind.startswith("fsdp") else 1)
    expected = exchanged(case.kind, model, micro_batches, weight=2, gradient=4)
    found = totals([c for part in step for c in part.collectives])
    if case.kind == "zero3":
        assert found.pop("all_gather", 0) <= 1.01 * expected.pop("all_gather")  # 0: all are there from the sample
    assert found == pytest.approx(expected, rel=2e-3 if case.kind.startswith("zero") else 0)


@pytest.mark.parametrize("case", SEVERAL, ids=str)
def test_inner_micro_batches_exchange_nothing_that_can_wait(case: Case, step: list[Part]) -> None:
    collectives = {part.name: part.collectives for part in step}
    inner = {c.name for c in collectives.get("forward_backward", [])}
    if case.kind in ("ddp", "zero1"):
        assert not inner
    elif case.kind == "fsdp whole":  # the step's weights come in its first forward, no gradient goes
        assert inner <= {"all_gather"}


@pytest.mark.parametrize("case", SEVERAL, ids=str)
def test_gradients_travel_while_others_are_still_made(case: Case, step: list[Part], store: TokenStore) -> None:
    last = next(part for part in step if part.name == "forward_backward, last")
    gradients = [c for c in last.collectives if c.name in ("all_reduce", "reduce_scatter")]
    assert gradients[0].early
    assert not gradients[-1].early, "the embedding's gradient is the last"
    if case.kind == "ddp":  # its time is exposed: with it goes only the LayerNorm before, which begins a bucket
        assert gradients[-1].bytes == 4 * WIDTH * (store.vocab_size + POSITIONS + 2)
    if case.kind == "zero3":  # small weights come with their block, none by itself
        assert max(len(part.collectives) for part in step) <= 4


@pytest.mark.parametrize("case", SEVERAL, ids=str)
def test_beside_weights_and_gradients_a_step_exchanges_few_numbers(case: Case, step: list[Part]) -> None:
    """On the host the loss and whether to stop; on the device the norm, and ZeRO's overflow."""
    first = measured[case][0]  # the second's sum on the host begins in it
    assert sum(c.on_host for part in first for c in part.collectives) == 1
    few = [c for part in step for c in part.collectives if not c.on_host and c.bytes <= SMALL]
    assert len(few) <= {"ddp": 0, "fsdp": 1, "fsdp whole": 1}.get(case.kind, 4), few
