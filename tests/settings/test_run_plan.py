"""What follows from settings: placement, plan, the released shapes, and --dry-run, which shows all of it."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import shlex
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import VOCABULARY, tiny_store
from wikift.base.errors import UserError
from wikift.base.model_files import shape_of
from wikift.base.shape import RELEASED, Shape
from wikift.commands.train import main
from wikift.settings.batch_layout import DEFAULT_GLOBAL_BATCH, MICRO_BATCH_CEILING, BatchLayout, batch_layout
from wikift.settings.checks import check_train
from wikift.settings.fields import TrainSettings
from wikift.settings.options import parse
from wikift.settings.resolve import command_of, resolve
from wikift.settings.run_plan import RunPlan, plan_run

ROOT = Path(__file__).resolve().parents[2]


def parsed(words: list[str]) -> TrainSettings:
    return parse(TrainSettings, words)


def problems(**words: Any) -> list[str]:
    return check_train(resolve(TrainSettings(**words), 1), 1, launched=False)


# --- placement ---------------------------------------------------------------------------------------------------

COUNT = st.none() | st.integers(1, 40)


@settings(max_examples=400, deadline=None)
@given(total=COUNT, ranks=st.integers(1, 9), micro=COUNT, accumulation=COUNT)
def test_placement_is_exact_or_one_problem_whose_advice_works(
    total: int | None, ranks: int, micro: int | None, accumulation: int | None
) -> None:
    """Against all pairs of micro-batch and accumulation, by trying."""
    wanted = TrainSettings(
        global_batch_size=total, per_device_train_batch_size=micro, gradient_accumulation_steps=accumulation
    )
    meant = total or (ranks * micro * accumulation if micro and accumulation else DEFAULT_GLOBAL_BATCH)
    possible = [
        (m, a)
        for m, a in itertools.product([micro] if micro else range(1, meant + 1), range(1, meant + 1))
        if ranks * m * a == meant and accumulation in (None, a)
    ]
    try:
        layout = batch_layout(wanted, ranks)
    except UserError as error:
        assert not possible
        (problem,) = error.problems
        assert problem.startswith(f"--global-batch-size {meant}{'' if total else ', the default'}: must be ")
        advised = re.search(r"; take (\d+)(?: or (\d+))?", problem)
        assert advised
        for number in filter(None, advised.groups()):
            batch_layout(dataclasses.replace(wanted, global_batch_size=int(number)), ranks)
        return
    assert layout.global_batch == meant
    assert layout.ranks == ranks
    assert (layout.micro_batch, layout.accumulation) in possible
    if micro is None and accumulation is None:  # the largest that is in reach
        assert layout.micro_batch == max(m for m, _ in possible if m <= MICRO_BATCH_CEILING)


# --- plan --------------------------------------------------------------------------------------------------------


def plan(tokens: int, place: BatchLayout | None = None, shape: Shape | None = None, **words: Any) -> RunPlan:
    chosen = resolve(TrainSettings(**words), 1)
    return plan_run(chosen, place or BatchLayout(1, 1, 1), shape or Shape(), tokens, 50257)


@settings(max_examples=300, deadline=None)
@given(
    tokens=st.integers(2, 10**7),
    block_size=st.integers(1, 1024),
    place=st.builds(BatchLayout, st.integers(1, 8), st.integers(1, 8), st.integers(1, 8)),
    tenths=st.integers(1, 100),
    percent=st.integers(1, 100),
    warm=st.integers(0, 99),
)
def test_plan_arithmetic(
    tokens: int, block_size: int, place: BatchLayout, tenths: int, percent: int, warm: int
) -> None:
    """Against exact fractions."""
    words = {"block_size": block_size, "num_train_epochs": tenths / 10, "warmup_steps": warm / 100}
    whole = (tokens - 1) // block_size
    if whole == 0:
        with pytest.raises(UserError, match="too few for one block"):
            plan(tokens, place, **words)
        return
    found = plan(tokens, place, data_fraction=percent / 100, **words)
    assert abs(found.blocks - Fraction(percent, 100) * whole) <= Fraction(1, 2) or found.blocks == 1
    steps = max(1, math.ceil(Fraction(tenths, 10) * found.blocks / place.global_batch))
    assert found.steps == steps
    assert found.schedule.warmup == min(math.ceil(Fraction(warm, 100) * steps), steps - 1)
    assert found.tokens_per_step == place.global_batch * block_size
    assert found.epochs == pytest.approx(steps * place.global_batch / found.blocks)


def test_plan_by_steps_and_defaults() -> None:
    assert 1.1 * 50 > 55
    assert plan(50 * 8 + 1, block_size=8, num_train_epochs=1.1).steps == 55
    found = plan(118_000_000, BatchLayout(4, 8, 1), max_steps=500, warmup_steps=50.0)
    assert (found.steps, found.schedule.warmup, found.block_size) == (500, 50, 1024)
    assert plan(10_001, shape=Shape(n_positions=16)).block_size == 16
    assert plan(32 * 1024 * 10 + 1, BatchLayout(1, 8, 4)).steps == 30  # three epochs of ten steps
    assert plan(1025, max_steps=1, warmup_steps=0.5).schedule.warmup == 0  # one step is not spent on a rate of 0


def test_everything_that_does_not_fit_comes_at_once() -> None:
    small = Shape(n_positions=16, vocab_size=100)
    with pytest.raises(UserError) as caught:
        plan(10, shape=small, block_size=32)
    found = caught.value.problems
    assert len(found) == 3
    assert found[0].startswith("--block-size 32: --model gpt2 has only 16 positions")
    assert "10 tokens" in found[1]
    assert "take --block-size 9 or less" in found[1]
    assert found[2].startswith("--model gpt2: its vocabulary has 100 tokens, the store's 50257")
    with pytest.raises(UserError, match="--config-overrides vocab_size=100"):
        plan(1000, shape=small, from_scratch=True, config_overrides="vocab_size=100")
    with pytest.raises(UserError, match="--warmup-steps 30: must be less than the run's 30 steps"):
        plan(32 * 1024 * 10 + 1, BatchLayout(1, 8, 4), warmup_steps=30.0)


# --- shapes ------------------------------------------------------------------------------------------------------

PARAMETERS = {
    "distilgpt2": 81_912_576,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}


def test_parameters_of_the_released_models() -> None:
    assert set(PARAMETERS) == set(RELEASED)
    for name, count in PARAMETERS.items():
        for spelled in (name, ("distilbert/" if name == "distilgpt2" else "openai-community/") + name):
            shape = shape_of(spelled)
            assert shape is not None
            assert shape.parameters == count


def test_parameters_are_those_of_the_model() -> None:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    for shape in (Shape(), Shape(3, 2, 10, 7, 31), Shape(2, 2, 8, 4, 9, n_inner=5)):
        with torch.device("meta"):
            model = GPT2LMHeadModel(GPT2Config(**dataclasses.asdict(shape)))
        assert shape.parameters == sum(p.numel() for p in model.parameters())


def test_flops_per_token_are_palms() -> None:
    gpt2 = Shape()
    assert gpt2.flops_per_token(1024) == 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 1024 * 768


# --- checks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("n_layer", ["n_layer: must be NAME=VALUE"]),
        ("n_layr=2", ["(did you mean n_layer?)"]),
        ("n_layer=2.5,n_head=0", ["n_layer must be a whole number of 1", "n_head must be a whole number of 1"]),
        ("n_head=2,n_head=4", ["n_head is set twice"]),
        ("attn_pdrop=1", ["at least 0 and below 1"]),
        ("layer_norm_epsilon=nan", ["must be a number above 0"]),
        ("initializer_range=inf", ["must be a number above 0"]),
        ("activation_function=rely", ["activation_function must be one of gelu_new"]),
        ("n_head=5", ["n_head=5: must divide n_embd=768; try n_head=1"]),
        ("n_positions=16", ["--block-size 32: --model gpt2 has only 16 positions"]),
    ],
)
def test_overrides(overrides: str, expected: list[str]) -> None:
    found = problems(from_scratch=True, config_overrides=overrides, block_size=32)
    assert len(found) == len(expected)
    assert all(words in problem for words, problem in zip(expected, found, strict=True))
    assert problems(from_scratch=True, config_overrides=" n_layer=2, n_embd=96 ,activation_function=relu,") == []


def test_every_activation_that_is_allowed_exists() -> None:
    from transformers.activations import ACT2FN

    from wikift.base.shape import OF_CONFIGS

    assert all(ACT2FN[name] is not None for name in OF_CONFIGS)


# --- dry run -----------------------------------------------------------------------------------------------------

LINES: list[list[str]] = [
    [],
    ["--model", "distilgpt2", "--max-steps", "100", "--warmup-steps", "0.07", "--learning-rate", "3e-5"],
    ["--dataset", "demo", "--tokenizer", "train:512", "--from-scratch", "--config-overrides", "n_layer=2,n_embd=96"],
    ["--num-train-epochs", "0.3", "--dropout", "0", "--no-append-eos", "--global-batch-size", "7", "--quiet"],
    ["--deepspeed", "zero2", "--config-overrides", "n_layer=1", "--from-scratch"],
    ["--output-dir", 'a "b" \\n c\t\u00fc \U0001f600 \x7f', "--resume", "never", "--adam-epsilon", "1e-12"],
]


@pytest.mark.parametrize("words", LINES)
def test_a_dry_run_given_back_is_the_same_run_and_nothing_is_written(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert main([*words, "--dry-run"]) == 0
    text = capsys.readouterr().out
    file = tmp_path / "run.toml"
    file.write_text(text, encoding="utf-8")
    assert main(["--config", str(file), "--dry-run"]) == 0
    again = capsys.readouterr().out.split("# memory of")[0]  # what is free changes
    lines = text.split("# memory of")[0].split("\n")
    assert again == "\n".join(line for line in lines if not line.startswith("# one process"))
    resolved = resolve(parsed(words), 1)
    assert dataclasses.replace(resolve(parsed(["--config", str(file)]), 1), config=None) == resolved
    assert list(folder.iterdir()) == []


def test_a_dry_run_shows_the_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    store = tiny_store(tmp_path / "store")  # 51 blocks of 8
    shape = "n_layer=2,n_head=2,n_embd=32,n_positions=16"
    words = ["--data", str(store), "--from-scratch", "--config-overrides", shape, "--block-size", "8"]
    assert (
        main([*words, "--global-batch-size", "8", "--num-train-epochs", "2", "--warmup-steps", "0.1", "--dry-run"]) == 0
    )
    derived = capsys.readouterr().out.split("# derived\n")[1].split("\n#\n")[0]
    count = Shape(2, 2, 32, 16, VOCABULARY).parameters
    assert derived.splitlines() == [
        "# batch: 8 blocks per step = 1 process x 8 blocks x 1 accumulation steps",
        f"# parameters: {count:,}",
        "# tokens per step: 64",
        "# train blocks: 51 blocks of 8 tokens",
        "# steps: 13 steps, 2.04 epochs",
        "# warm-up steps: 2",
        "# starts: at step 1",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]


def test_the_command_is_parsed_to_the_settings_it_was_made_of() -> None:
    settings = TrainSettings(
        dataset=("my text; rm -rf x.txt", "b.txt"), from_scratch=True, fsdp_reshard=False, learning_rate=3e-4,
        max_steps=5, model="gpt2-medium", adam_epsilon=1e-6,
    )  # fmt: skip
    words = shlex.split(command_of(settings, 1))
    assert words[:2] == ["wikift", "train"]
    assert parsed(words[2:]) == settings
    assert command_of(TrainSettings(), 4) == "torchrun --nproc_per_node=4 -m wikift train"
