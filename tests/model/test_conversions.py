"""Weights that others wrote, converted by the command that is named; counts; large files.

Run: pytest tests/model/test_conversions.py
"""

from __future__ import annotations

import json
import math
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config

from tests.model.test_initial_weights import Weights, read_both_ways, rewrite, weights_of
from tests.tiny import arguments
from wikift.base.errors import UserError
from wikift.base.shape import EMBEDDING, HEAD
from wikift.commands import generate, train
from wikift.data.store import TokenStore
from wikift.model.gpt2 import load_config, load_model, shapes_of
from wikift.model.initial_weights import trained_weights


def python_in(problem: str) -> list[str]:
    words = shlex.split(problem[problem.index("python -c") :].partition("; then name")[0])
    return [sys.executable, *words[1:3]]


def nanogpt(weights: Weights, folder: Path) -> None:
    """As nanoGPT saves it: linear layers (out, in), compiled, no tokenizer."""
    shutil.rmtree(folder)
    folder.mkdir()
    linear = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
    saved = {"_orig_mod." + n: t.t().contiguous() if n.endswith(linear) else t for n, t in weights.items()}
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": weights["transformer.wpe.weight"].shape[0]}
    torch.save({"model": saved, "model_args": sizes, "iter_num": 100}, folder / "ckpt.pt")


def pickled(weights: Weights, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(weights | {HEAD: weights[EMBEDDING]}, folder / "pytorch_model.bin")


@pytest.mark.parametrize(("save", "made"), [(nanogpt, "converted"), (pickled, ".")])
def test_the_command_that_is_named_converts(
    sound: Path, folder: Path, save: Callable[[Weights, Path], None], made: str
) -> None:
    save(weights_of(sound), folder)
    with pytest.raises(UserError) as caught:
        load_model(str(folder))
    program, option, code = python_in(str(caught.value))
    ran = subprocess.run(
        [program, option, code.replace('"gpt2"', json.dumps(str(sound)))], capture_output=True, text=True, timeout=100
    )
    assert ran.returncode == 0, ran.stderr
    loaded, _ = read_both_ways(folder / made)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights_of(sound).items())


def test_the_counts_are_the_real_ones(folder: Path, store: TokenStore, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(folder, lambda weights: weights | {HEAD: weights[EMBEDDING] * 2})
    count = sum(tensor.numel() for tensor in weights_of(folder).values())
    training = arguments(store.path, folder.parent / "run", from_scratch=None, config_overrides=None, model=folder)
    assert train.main([*training, "--dry-run"]) == 0
    assert f"parameters: {count:,}" in capsys.readouterr().out
    assert generate.main([str(folder), "--prompt", "The", "--device", "cpu", "--max-new-tokens", "1"]) == 0
    assert f"{count:,} parameters" in capsys.readouterr().err


def test_weights_behind_4_gib_of_a_file_are_read(tmp_path: Path) -> None:
    """A sparse file, zeros but for what ends it: an embedding of 4 GiB, the last norm after it."""
    config = GPT2Config(vocab_size=2**27 + 8, n_embd=8, n_layer=1, n_head=1, n_positions=4, tie_word_embeddings=True)
    config.save_pretrained(tmp_path)
    header, end = dict[str, object](), 0
    for name, shape in sorted(shapes_of(config).items(), key=lambda entry: -math.prod(entry[1])):
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        file.seek(8 + len(text) + 2**32)  # the last eight rows of the embedding, and all behind them
        file.write(torch.arange(end // 4 - 2**30, dtype=torch.float32).numpy().tobytes())
    read = trained_weights(str(tmp_path), load_config(str(tmp_path)), "--model", print).read
    assert read(EMBEDDING, 2**30 - 1, 2**30 + 64).tolist() == [0, *range(64)]
    assert read(name, 0, 8).tolist() == list(range(end // 4 - 2**30 - 8, end // 4 - 2**30))
