"""What plan forecasts: published figures, peaks of real processes, the command to type."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.tiny import arguments, tiny_store, train
from wikift.base.files import parse_size
from wikift.commands.plan import main
from wikift.engines.memory import state_parts

GB, GIB = 1e9, 1 << 30
GPUS = ["--gpus", "8", "--gpu-memory", "80GB"]


def state(parameters: float, ranks: int, stage: int, *sizes: int) -> int:
    return sum(part.bytes for part in state_parts(int(parameters), ranks, stage, *sizes).values())


def test_the_figures_of_the_zero_paper() -> None:
    """Rajbhandari et al., arXiv:1910.02054, figure 1: 7.5B parameters on 64 GPUs, Adam in mixed precision."""
    figures = [round(state(7.5e9, 64, stage, 2, 2, 12) / GB, 1) for stage in range(4)]
    assert figures == [120.0, 31.4, 16.6, 1.9]


def test_the_figures_of_deepspeeds_estimators() -> None:
    """For t5-3b on 8 GPUs its documentation (memory.rst) has 15.93 and 6.10 GB; the first was changed in the code."""
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    parameters, largest = 2_851_598_336, 32_899_072
    assert round(state(parameters, 8, 2, 4, 4, 12) / GIB, 2) == 15.93
    assert round((state(parameters, 8, 3, 2, 4, 12) + 4 * largest) / GIB, 2) == 6.10
    for count, gpus in ((parameters, 8), (737_670_000, 4), (124_439_808, 1)):
        _, two = stage_1_and_2.estimate_zero2_model_states_mem_needs(count, gpus, cpu_offload=False)
        _, three, _ = stage3.estimate_zero3_model_states_mem_needs(
            count, largest, gpus, cpu_offload=False, cpu_offload_params=False
        )
        assert state(count, gpus, 2, 2, 6, 12) == pytest.approx(two, abs=3)
        assert state(count, gpus, 3, 2, 4, 12) + 4 * largest == pytest.approx(three, abs=3)


def derived(capsys: pytest.CaptureFixture[str], *options: str, code: int = 0) -> str:
    assert main([*options]) == code
    return capsys.readouterr().out.split("# derived\n")[1]


def test_a_plan_for_gpus_that_are_not_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = derived(capsys, "--model", "gpt2-xl", *GPUS, "--mfu", "0.4", "--gpu", "H100")
    rows = {row.split()[1]: row.split()[2:] for row in text.splitlines() if re.match(r"# \S+ +\d+ +\d+\.\d", row)}
    assert list(rows) == ["single", "ddp", "fsdp", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]
    assert rows["ddp"][:4] == ["4", "6.23", "6.23", "12.46"]  # 4, 4 and 8 bytes of 1,557,611,200 parameters
    assert rows["zero3"][:4] == ["4", "0.39", "0.78", "2.34"]  # 2, 4 and 12 bytes, by 8 GPUs
    for row in rows.values():
        assert sum(map(float, row[1:-1])) == pytest.approx(float(row[-1]), abs=0.03)
    assert "#   zero2: weights 2P, gradients 4P/N, optimizer 12P/N, buffers 6Vd\n" in text
    # 0.4 x 8 x 989.4e12 / 10.28e9 FLOP a token; llm.c publishes 48.5k a GPU at 50%
    speed = int(re.search(r"speed: ([\d,]+) tokens/s", text)[1].replace(",", ""))  # type: ignore[index]
    assert speed == pytest.approx(8 * 48_500 * 0.4 / 0.504, rel=0.01)
    assert "# time: about 19:5" in text  # 3 epochs of 119,804 blocks
    assert text.count("engine ddp, 8 processes, about") == 1
    assert "torchrun --nproc_per_node=8 -m wikift train --model gpt2-xl\n" in text
    assert "\n# recommended: engine zero2, " in derived(capsys, "--deepspeed", "zero2", *GPUS)
    assert list(tmp_path.iterdir()) == []


def test_where_it_does_not_fit_the_plan_names_what_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = derived(capsys, "--model", "gpt2-xl", "--gpus", "1", "--gpu-memory", "24GB", code=2)
    assert " (too much) " in text
    assert "# time: not known; --trial" in text
    assert "wikift train --model gpt2-xl --deepspeed zero2_offload\n" in text
    text = derived(capsys, "--model", "gpt2-large", "--gpus", "1", "--gpu-memory", "24GB", "--max-steps", "9")
    assert "# steps: 9 steps" in text
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["--model", "gpt2-xl", "--gpus", "1", "--gpu-memory", "24GB"]) == 0, "rank 0 speaks before it fails"


def tried(options: list[str]) -> None:
    assert main(options) == 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_trial_measures_and_proposes_and_keeps_nothing(
    ranks: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = arguments(tiny_store(tmp_path / "store"), tmp_path / "run", quiet=None)
    run_ranks(tried, ranks, [*line, "--trial", "40", "--find-lr"])
    text = capsys.readouterr().out
    assert re.search(r"# measured in 40 steps: [\d.]+ MB a process at its peak, [\d.]+ MB forecast\n", text)
    assert re.search(r"# speed: [\d,]+ tokens/s, \S+ s a step \(measured\)\n", text)
    assert re.search(r"# time: about 0:\d\d = 12 steps 0:\d\d, 3 validations", text)
    curve = [float(loss) for loss in re.findall(r"#   \d\.\de-\d\d +(\d+\.\d+)  #+", text)]
    assert len(curve) == 20
    assert curve[0] == pytest.approx(4.6, abs=0.1)  # ln 97
    assert min(curve) < curve[0] - 0.05
    proposed = re.findall(r"proposed: --learning-rate (\S+), a tenth of", text)
    assert 1e-4 < float(proposed[0]) < 1e-1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]


FORECASTS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (1, {"precision": "bf16", "gradient_checkpointing": True}),
    (2, {"engine": "ddp"}),
    (2, {"engine": "fsdp"}),
    (2, {"precision": "bf16", "deepspeed": "zero2"}),
    (2, {"precision": "bf16", "deepspeed": "zero3"}),
]


@pytest.mark.parametrize(
    ("ranks", "settings"), [FORECASTS[0], *(pytest.param(*f, marks=pytest.mark.long) for f in FORECASTS[1:])]
)
def test_train_forecasts_its_memory_within_a_tenth(
    ranks: int, settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """23 million parameters, micro-batches of 2 x 128 tokens, two in a step, a checkpoint after each step."""
    store = tiny_store(tmp_path / "store", train=9_000, validation=2_100, vocabulary=32_000)
    wanted = {
        "config_overrides": "n_layer=6,n_head=8,n_embd=384", "block_size": 128, "global_batch_size": 4 * ranks,
        "per_device_train_batch_size": 2, "max_steps": 2, "save_steps": 1, "eval_steps": 2, "quiet": None, **settings,
    }  # fmt: skip
    run_ranks(train, ranks, arguments(store, tmp_path / "run", **wanted), timeout_seconds=300)
    text = capsys.readouterr().out
    first = re.search(r"memory: about ([\d.]+ [MG]B) a process: weights", text)
    last = re.search(r"memory: ([\d.]+ [MG]B) a process at its peak, ([\d.]+ [MG]B) forecast", text)
    assert first is not None
    assert last is not None
    assert first[1] == last[2]
    assert parse_size(last[2]) == pytest.approx(parse_size(last[1]), rel=0.1)
