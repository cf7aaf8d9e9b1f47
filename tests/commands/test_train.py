"""What wikift train offers beside the contract: precision, checkpointing, compile, own text, what is said."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.tiny import arguments, curve, metrics, problems_of_training, tiny_store, train
from tests.training.test_early_stopping import stopped_at
from wikift.base.errors import EnvironmentFault
from wikift.base.folders import list_checkpoints
from wikift.checkpoint.reader import open_checkpoint
from wikift.commands.consolidate import main as consolidate
from wikift.commands.train import main
from wikift.training import run

ROOT = Path(__file__).resolve().parents[2]


def test_gradient_checkpointing_and_deterministic_kernels_are_the_same_run(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("plain", "gradient_checkpointing", "deterministic"):
        line = arguments(store, tmp_path / name, **({} if name == "plain" else {name: True}))
        assert run_ranks(train, 1, line) == [0]
    assert curve(tmp_path / "plain") == curve(tmp_path / "gradient_checkpointing")
    assert curve(tmp_path / "plain") == curve(tmp_path / "deterministic")
    assert "Warning" not in capsys.readouterr().out


def test_compile_is_the_same_run_within_rounding(store: Path, tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    for name in ("plain", "compiled"):
        line = arguments(store, tmp_path / name, compile=name == "compiled", dropout=0, learning_rate=1e-3, max_steps=4)
        assert run_ranks(train, 1, line, timeout_seconds=300) == [0]
    for got, expected in zip(curve(tmp_path / "compiled"), curve(tmp_path / "plain"), strict=True):
        assert got[1] == pytest.approx(expected[1], abs=1e-5)
        assert got[2] == pytest.approx(expected[2], rel=1e-5)


def without_a_compiler(command_line: list[str]) -> list[str]:
    import os

    os.environ["PATH"] = ""
    os.environ.pop("CXX", None)
    return problems_of_training(command_line)


@pytest.mark.parametrize("ranks", [1, 2])
def test_compile_without_a_compiler_is_said(store: Path, tmp_path: Path, ranks: int) -> None:
    for (problem,) in run_ranks(without_a_compiler, ranks, arguments(store, tmp_path / "run", compile=True)):
        assert problem.startswith("--compile: needs a compiler, g++ is not found")
    assert not (tmp_path / "run").exists(), "nothing written"


def test_bf16_keeps_fp32_weights_and_stays_near_fp32(store: Path, tmp_path: Path) -> None:
    for precision in ("fp32", "bf16"):
        words: dict[str, Any] = {"precision": precision, "dropout": 0, "learning_rate": 1e-3}
        assert run_ranks(train, 1, arguments(store, tmp_path / precision, **words)) == [0]
    gaps = [abs(a[1] - b[1]) for a, b in zip(curve(tmp_path / "bf16"), curve(tmp_path / "fp32"), strict=True)]
    # bf16 keeps 8 bits: a relative error of 2**-8 a product, on logits of order 1 and losses of 4.6
    assert 0 < max(gaps) < 2**-8 * 4.6
    opened = open_checkpoint(list_checkpoints(tmp_path / "bf16")[-1])
    weight = opened.read("transformer.wte.weight", "weight", 0, 32)
    assert not torch.equal(weight, weight.bfloat16().float()), "the master weights were rounded"


@pytest.mark.parametrize("ranks", [1, 2])
def test_fp16_counts_skipped_steps_and_resumes_bit_for_bit(store: Path, tmp_path: Path, ranks: int) -> None:
    words: dict[str, Any] = {"precision": "fp16", "save_steps": 1, "save_total_limit": 12}
    whole, run = tmp_path / "whole", tmp_path / "run"
    # a loss scale of 65,536 overflows on this model's first steps only if its gradients are large: make them so
    words["config_overrides"] = "n_layer=2,n_head=2,n_embd=32,n_positions=16,initializer_range=3.0"
    assert run_ranks(train, ranks, arguments(store, whole, **words)) == [0] * ranks
    skipped = metrics(whole)[-1]["skipped_steps"]
    assert skipped > 0
    assert metrics(whole)[0]["grad_norm"] is None, "an overflow is null in JSON, which has no infinity"
    assert metrics(whole)[-1]["seconds_left"] == 0, "the last validation is over"
    opened = open_checkpoint(list_checkpoints(whole)[-1])
    assert float(opened.read("optimizer", "updates", 0, 1)) == 12 - skipped, "a skipped step must not advance Adam"
    assert float(opened.read("optimizer", "loss_scale", 0, 1)) == 65536 / 2**skipped
    shutil.copytree(whole, run)
    for path in list_checkpoints(run)[2:]:
        shutil.rmtree(path)
    assert run_ranks(train, ranks, arguments(store, run, **words)) == [0] * ranks
    assert curve(run) == curve(whole)
    assert metrics(run)[-1]["skipped_steps"] == skipped


def test_divergence_ends_the_run_with_advice(store: Path, tmp_path: Path) -> None:
    line = arguments(store, tmp_path / "run", learning_rate=1e30, max_grad_norm=0, adam_epsilon=1e-30)
    ((kind, words),) = run_ranks(problems_of_training, 1, line)
    assert kind == "fault"
    assert "diverged" in words
    assert "--learning-rate" in words
    for path in list_checkpoints(tmp_path / "run"):
        opened = open_checkpoint(path)
        assert opened.read("transformer.wte.weight", "weight", 0, 32).isfinite().all()


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_what_no_run_wrote_is_not_written_over(store: Path, tmp_path: Path, resume: str) -> None:
    for name in ("config.json", "metrics.jsonl", "store.json"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text('{"model_type": "gpt2"}')
        (problem,) = problems_of_training(arguments(store, folder, resume=resume))
        assert problem.startswith(f"--output-dir {folder}: has {name}, not of a wikift run")
        assert [path.read_text() for path in folder.iterdir()] == ['{"model_type": "gpt2"}']
    (tmp_path / "logged").mkdir()
    (tmp_path / "logged" / "slurm-17.out").touch()
    assert train(arguments(store, tmp_path / "logged", resume=resume, max_steps=1, eval_steps=None)) == 0


def test_a_run_that_cannot_be_written_any_more_is_said(store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run_ranks(train, 1, arguments(store, folder)) == [0]
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()  # nobody is root enough to write over it
    line = arguments(store, folder, max_steps=16)
    for (problem,) in run_ranks(problems_of_training, 1, line):
        assert problem.startswith(f"{folder}: cannot be written (Is a directory: {folder}/config.json")


def test_a_flip_in_the_tokens_is_refused_before_training(tmp_path: Path) -> None:
    line = arguments(tiny_store(tmp_path / "store", train=40_000), tmp_path / "run", max_steps=1)
    with open(tmp_path / "store" / "train.bin", "r+b") as file:
        file.seek(2 * 20_001)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))  # another id of the vocabulary, in a block that this run does not even read
    ((problem,),) = run_ranks(problems_of_training, 1, line)
    assert "train.bin is damaged: its SHA-256" in problem


def with_little_memory(command_line: list[str]) -> list[str]:
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (600 << 20), resource.RLIM_INFINITY))
    return problems_of_training(command_line)


def test_memory_used_up_ends_the_run_with_advice(store: Path, tmp_path: Path) -> None:
    line = arguments(store, tmp_path / "run", config_overrides="n_layer=12,n_head=8,n_embd=1024,n_positions=16")
    ((kind, words),) = run_ranks(with_little_memory, 1, line)
    assert kind == "fault"
    assert "this machine is out of memory" in words
    assert "--per-device-train-batch-size" in words


def test_deterministic_is_said_before_the_ranks_meet(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL reads it when it starts, and takes sums in NVLink's switches otherwise."""
    told = []

    def meet(device: str, timeout_seconds: float) -> None:
        told.append(torch.are_deterministic_algorithms_enabled())
        raise EnvironmentFault("met")

    monkeypatch.setattr(run, "started_world", meet)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        with pytest.raises(EnvironmentFault, match="met"):
            main(arguments(store, tmp_path / "run", deterministic=True))
    finally:
        torch.use_deterministic_algorithms(False)
    assert told == [True]


def test_the_logged_loss_is_the_mean_over_the_whole_global_batch(store: Path, tmp_path: Path) -> None:
    """Learning rate 0 at the first step of a warm-up: the loss is that of the initial weights on blocks we can name."""
    import numpy as np

    from wikift.data.batches import BatchLayout, micro_batches
    from wikift.data.store import open_store

    words: dict[str, Any] = {"dropout": 0, "warmup_steps": 5, "per_device_train_batch_size": 2}
    assert run_ranks(train, 2, arguments(store, tmp_path / "run", **words)) == [0, 0]
    stream = micro_batches(open_store(store).tokens("train"), np.arange(51), BatchLayout(8, 8), run_seed=42)
    (expected,) = run_ranks(initial_loss, 1, next(stream)[0])
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(expected, abs=1e-5)


def initial_loss(blocks: torch.Tensor) -> float:
    from tests.tiny_engines import make_engine, random_start, tiny_config
    from wikift.base.world import World

    config = tiny_config()
    engine = make_engine("single", World(), config)
    engine.restore(random_start(config, seed=42))
    return float(engine.nll(blocks[:, :-1], blocks[:, 1:])) / blocks[:, 1:].numel()


def test_validation_counts_every_token_once(store: Path, tmp_path: Path) -> None:
    """61 tokens in blocks of 8: seven whole ones and a short one, on one and on three ranks alike."""
    for ranks in (1, 3):
        words: dict[str, Any] = {"dropout": 0, "global_batch_size": 6, "max_steps": 4, "per_device_eval_batch_size": 2}
        assert run_ranks(train, ranks, arguments(store, tmp_path / f"run{ranks}", **words)) == [0] * ranks
    one, three = (metrics(tmp_path / f"run{ranks}")[-1] for ranks in (1, 3))
    assert one["eval_loss"] == pytest.approx(three["eval_loss"], rel=1e-6)
    assert one["eval_perplexity"] == pytest.approx(math.exp(one["eval_loss"]))
    # 61 tokens in 30 words: ppl_word = ppl_token ** (T / T_o), though the first token is not predicted
    assert one["eval_word_perplexity"] == pytest.approx(math.exp(one["eval_loss"] * 61 / 30))


@pytest.mark.parametrize("ranks", [1, 2])
def test_max_eval_samples_is_the_beginning_of_the_validation_text(tmp_path: Path, ranks: int) -> None:
    for name, tokens, blocks in (("all", 61, 3), ("short", 3 * 8 + 1, None)):
        store = tiny_store(tmp_path / f"{name}-store", validation=tokens)
        assert run_ranks(train, ranks, arguments(store, tmp_path / name, max_eval_samples=blocks)) == [0] * ranks
    assert curve(tmp_path / "all") == curve(tmp_path / "short")
    store = tmp_path / "all-store"
    (problems,) = run_ranks(problems_of_training, 1, arguments(store, tmp_path / "x", max_eval_samples=8))
    assert problems == ["--max-eval-samples 8: has no effect, validation has 8 blocks; remove it"]
    (problems,) = run_ranks(problems_of_training, 1, arguments(store, tmp_path / "all", max_steps=16))
    assert problems[0].startswith("--max-eval-samples None: this run was started with 3")


def test_save_only_model_is_a_third_as_large_and_is_not_resumed(tmp_path: Path) -> None:
    store = tiny_store(tmp_path / "store")
    sizes = []
    for name, alone in (("full", False), ("alone", True)):
        line = arguments(store, tmp_path / name, max_steps=8, save_only_model=alone)
        assert run_ranks(train, 2, line) == [0, 0]
        (file, _) = sorted((list_checkpoints(tmp_path / name)[-1]).glob("*.safetensors"))
        sizes.append(file.stat().st_size)
        if alone:
            assert consolidate([str(tmp_path / name)]) == 0
            assert run_ranks(train, 2, line) == [0, 0], "finished all the same"
    assert sizes[1] < 0.4 * sizes[0]
    assert curve(tmp_path / "alone") == curve(tmp_path / "full")
    ((problem,),) = run_ranks(problems_of_training, 1, arguments(store, tmp_path / "alone", max_steps=12))
    assert "has weights alone (--save-only-model), so no run resumes from it; --resume never" in problem
    line = arguments(store, tmp_path / "stopped", max_steps=8, save_only_model=True)
    assert run_ranks(stopped_at, 1, 5, line) == [75], "the same command resumes, so its checkpoint is complete"
    assert run_ranks(train, 1, line) == [0]
    assert run_ranks(train, 1, arguments(store, tmp_path / "single", max_steps=8)) == [0]
    assert [values[:5] for values in curve(tmp_path / "stopped")] == [
        values[:5] for values in curve(tmp_path / "single")
    ]


def test_own_text_is_prepared_by_one_rank_while_the_others_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("".join(f"Line {n} tells of the number {n * n}.\n" for n in range(400)), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    words: dict[str, Any] = {"data": None, "dataset": text, "tokenizer": "train:300", "quiet": False, "max_steps": 2}
    line = arguments(Path(), tmp_path / "run", **words)
    assert run_ranks(in_folder, 2, str(tmp_path), line) == [0, 0]
    store = tmp_path / "data" / "mine.txt-train-300" / "store.json"
    made = store.stat().st_mtime_ns
    assert len(metrics(tmp_path / "run")) == 2
    assert capsys.readouterr().out.count("engine ddp") == 1, "only rank 0 speaks"
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["settings"]["dataset"] == [str(text)]
    assert record["store"]["splits"]["train"]["tokens"] > 0
    # another seed is another run on the same text, cut in the same place
    again = arguments(Path(), tmp_path / "again", **words, seed=7)
    assert run_ranks(in_folder, 1, str(tmp_path), again) == [0]
    assert store.stat().st_mtime_ns == made


def in_folder(folder: str, command_line: list[str]) -> int:
    import os

    os.chdir(folder)
    return train(command_line)


def test_what_the_data_lacks_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tiny_store(tmp_path / "store", train=3 * 8 + 1, validation=0)
    assert train(arguments(store, tmp_path / "run", quiet=False, max_steps=1, eval_steps=None)) == 0
    text = capsys.readouterr().out
    assert "no validation" in text
    assert "3 blocks of 8 tokens, each read up to 3 times in one step: lower --global-batch-size" in text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_run_is_near_the_cpu_run(store: Path, tmp_path: Path) -> None:
    for device in ("cpu", "cuda"):
        assert train(arguments(store, tmp_path / device, device=device, dropout=0, learning_rate=1e-3)) == 0
    for got, expected in zip(curve(tmp_path / "cuda"), curve(tmp_path / "cpu"), strict=True):
        assert got[1] == pytest.approx(expected[1], abs=1e-3)


def hub_cache(folder: Path, name: str, source: Path) -> Path:
    """A Hub's cache that holds `source` as the model `name`, as huggingface_hub lays it out."""
    commit = "0" * 40
    model = folder / f"models--{name.replace('/', '--')}"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(commit)
    shutil.copytree(source, model / "snapshots" / commit)
    return folder


def test_a_store_of_another_tokenizer_is_refused_for_a_model_of_the_hub_too(tmp_path: Path) -> None:
    """It would train on ids that mean other tokens, without a word."""
    (tmp_path / "text.txt").write_text("some words of text\n" * 400)
    prepare = "from wikift.commands.main import run; from wikift.commands.prepare import main; run(main)"
    for name, size in (("one", 270), ("other", 300)):
        words = ["--dataset", "text.txt", "--tokenizer", f"train:{size}", "--out", name, "--quiet"]
        subprocess.run([sys.executable, "-c", prepare, *words], cwd=tmp_path, check=True, timeout=120)
    model = tmp_path / "model"
    shutil.copytree(tmp_path / "one" / "tokenizer", model)
    (model / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_positions": 16, "vocab_size": 300}))
    environment = {**os.environ, "HF_HUB_CACHE": str(hub_cache(tmp_path / "cache", "owner/tiny", model))}
    for data in ("other", "one"):
        done = subprocess.run(
            [sys.executable, ROOT / "launch" / "train.py", "--data", data, "--model", "owner/tiny"],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == (2 if data == "other" else 1), "its weights are not in the cache"
        assert ("its tokenizer is not the one that made other" in done.stderr) == (data == "other"), done.stderr
        assert "Traceback" not in done.stderr
