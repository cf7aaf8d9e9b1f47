"""No answer from weights that were not loaded: one loader for generate, evaluate and train.

pytest tests/model/test_initial_weights.py
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, GPT2LMHeadModel

from tests.tiny import arguments
from tests.tiny_engines import tiny_config
from tests.trained import SENTENCES, text_store
from wikift.base.errors import UserError
from wikift.commands import evaluate, generate, train
from wikift.data.store import TokenStore
from wikift.model.gpt2 import load_config, load_model
from wikift.model.initial_weights import EMBEDDING, HEAD, trained_weights

FC = "transformer.h.1.mlp.c_fc.weight"
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return text_store(tmp_path_factory.mktemp("weights") / "store")


@pytest.fixture(scope="module")
def sound(store: TokenStore) -> Path:
    """A model of random weights with the tokenizer of `store`."""
    folder = store.path.parent / "model"
    torch.manual_seed(3)
    GPT2LMHeadModel(tiny_config(vocab_size=store.vocab_size)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(store.path / "tokenizer").save_pretrained(folder)
    return folder


def weights_of(folder: Path) -> Weights:
    return dict(load_file(folder / "model.safetensors"))


def changed(sound: Path, folder: Path, change: Callable[[Weights], Weights]) -> Path:
    """A copy of the model whose file holds other tensors."""
    shutil.copytree(sound, folder)
    tensors = {name: tensor.clone().contiguous() for name, tensor in change(weights_of(sound)).items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def read_both_ways(folder: Path, say: Callable[[str], None] = lambda line: None) -> tuple[Weights, Weights]:
    """The parameters as generate and evaluate load them, and as train reads them, in two ranges each."""
    model = load_model(str(folder))
    _, read = trained_weights(str(folder), load_config(str(folder)), "--model", say)
    ranges = {}
    for name, parameter in model.named_parameters():
        count = parameter.numel()
        ranges[name] = torch.cat([read(name, 0, count // 3), read(name, count // 3, count)]).view(parameter.shape)
    return {name: p.detach() for name, p in model.named_parameters()}, ranges


def wrapped(prefix: str) -> Callable[[Weights], Weights]:
    return lambda weights: {prefix + name: tensor for name, tensor in weights.items()}


def without_prefix(weights: Weights) -> Weights:
    """As the Hub's gpt2: no `transformer.`, and the causal masks of old releases."""
    bare = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    masks = {"h.0.attn.bias": torch.ones(1, 1, 16, 16).tril().bool(), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    return bare | masks


READ_ALIKE: list[tuple[Callable[[Weights], Weights], str]] = [
    (lambda weights: weights, ""),
    (wrapped("_orig_mod."), "removed _orig_mod. from"),  # saved from a compiled model
    (wrapped("module."), "removed module. from"),  # from one in DDP
    (wrapped("module._orig_mod.model."), "removed _orig_mod., model., module. from"),
    (without_prefix, ""),
    (lambda weights: weights | {HEAD: weights[EMBEDDING]}, ""),
    (lambda weights: {HEAD if name == EMBEDDING else name: tensor for name, tensor in weights.items()}, ""),
]


@pytest.mark.parametrize(("change", "said"), READ_ALIKE)
def test_a_model_is_read_by_whatever_names_its_file_has(
    sound: Path, tmp_path: Path, change: Callable[[Weights], Weights], said: str
) -> None:
    lines: list[str] = []
    loaded, ranges = read_both_ways(changed(sound, tmp_path / "model", change), lines.append)
    original = weights_of(sound)
    assert set(loaded) == set(original)
    for name, tensor in original.items():
        assert torch.equal(loaded[name], tensor), name
        assert torch.equal(ranges[name], tensor), name
    assert len(lines) == bool(said)
    assert said in "".join(lines)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_as_transformers_reads_it(sound: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    folder = changed(sound, tmp_path / "model", lambda weights: {n: t.to(dtype) for n, t in weights.items()})
    theirs = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)
    for weights in read_both_ways(folder):
        for name, parameter in theirs.named_parameters():
            assert torch.equal(weights[name], parameter), name


def test_another_head_than_the_embedding_is_read_as_transformers_reads_it(sound: Path, tmp_path: Path) -> None:
    """transformers 5 unties it, whatever config.json says; so does every command, and it is said."""
    lines: list[str] = []
    folder = changed(sound, tmp_path / "model", lambda weights: weights | {HEAD: weights[EMBEDDING] * 2})
    loaded, ranges = read_both_ways(folder, lines.append)
    theirs = dict(GPT2LMHeadModel.from_pretrained(folder).named_parameters())
    assert set(loaded) == set(theirs)
    for name, parameter in theirs.items():
        assert torch.equal(loaded[name], parameter), name
        assert torch.equal(ranges[name], parameter), name
    assert "not tied" in lines[0]


def with_value(value: float) -> Callable[[Weights], Weights]:
    def change(weights: Weights) -> Weights:
        weights[FC][0, 0] = value
        return weights

    return change


REFUSED: list[tuple[Callable[[Weights], Weights], str]] = [
    (lambda w: {n: t for n, t in w.items() if n != FC}, rf"model.safetensors lacks {FC}$"),
    (lambda w: {n: t for n, t in w.items() if ".h." not in n}, r"lacks transformer.h.0.ln_1.weight, .* and 21 more$"),
    (lambda w: w | {"score.weight": torch.zeros(2, 32)}, "holds what a GPT-2 has not: score.weight$"),
    (lambda w: w | {"module." + FC: w[FC]}, rf"holds what a GPT-2 has not: {FC}$"),  # twice
    (lambda w: w | {FC: w[FC].t()}, rf"does not fit config.json: {FC} is F32 \[128, 32\] .* \[32, 128\]$"),
    (lambda w: w | {FC: w[FC].double()}, rf"does not fit config.json: {FC} is F64 \[32, 128\] and not F32"),
    (with_value(math.nan), f"{FC} holds NaN or infinity"),
    (with_value(-math.inf), f"{FC} holds NaN or infinity"),
]


@pytest.mark.parametrize(("change", "problem"), REFUSED)
def test_weights_that_are_not_the_models_are_refused(
    sound: Path, tmp_path: Path, change: Callable[[Weights], Weights], problem: str
) -> None:
    folder = changed(sound, tmp_path / "model", change)
    with pytest.raises(UserError, match=rf"^NAME {folder}: .*{problem}"):
        load_model(str(folder), setting="NAME")
    with pytest.raises(UserError, match=rf"^NAME {folder}: .*{problem}"):  # as train reads it
        trained_weights(str(folder), load_config(str(folder)), "NAME", lambda line: None).read(FC, 0, 32 * 128)


def test_large_finite_weights_are_read(sound: Path, tmp_path: Path) -> None:
    """Their sum overflows."""
    folder = changed(sound, tmp_path / "model", lambda weights: weights | {FC: torch.full_like(weights[FC], 3e38)})
    assert torch.equal(read_both_ways(folder)[0][FC], torch.full((32, 128), 3e38))


def test_an_untied_head_must_be_in_the_file(sound: Path, tmp_path: Path) -> None:
    folder = changed(sound, tmp_path / "model", lambda weights: weights)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(UserError, match=rf"model.safetensors lacks {HEAD}$"):
        load_model(str(folder))


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 548105171\n".encode()
DAMAGED: list[tuple[Callable[[bytes], bytes], str]] = [
    (lambda content: content[: len(content) // 2], r"cannot be read \(.* bytes of .*\); copy or download it again"),
    (lambda content: content[:100], "cannot be read"),
    (lambda content: b"", "cannot be read"),
    (lambda content: (2).to_bytes(8, "little") + b"[]", "cannot be read .*not the header of a safetensors file"),
    (lambda content: content.replace(b'"shape":[32,128]', b'"shape":[32,127]'), r"cannot be read .*F32 \[32, 127\]"),
    (lambda content: POINTER, "model.safetensors is a Git LFS pointer, not the weights; run: git lfs pull"),
]


@pytest.mark.parametrize(("damage", "problem"), DAMAGED)
def test_a_damaged_file_is_the_users_to_replace(
    sound: Path, tmp_path: Path, damage: Callable[[bytes], bytes], problem: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sound, folder)
    (folder / "model.safetensors").write_bytes(damage((sound / "model.safetensors").read_bytes()))
    with pytest.raises(UserError, match=problem):
        load_model(str(folder))


def test_weights_in_several_files(sound: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sound, folder)
    (folder / "model.safetensors").unlink()
    GPT2LMHeadModel.from_pretrained(sound).save_pretrained(folder, max_shard_size="30KB")
    files = sorted(folder.glob("model-0*"))
    assert len(files) > 2
    for weights in read_both_ways(folder):
        assert all(torch.equal(weights[name], tensor) for name, tensor in weights_of(sound).items())
    files[1].unlink()
    with pytest.raises(UserError, match=f"names files that are missing: {files[1].name}; copy or download them again"):
        load_model(str(folder))


@pytest.mark.parametrize("files", [(), ("pytorch_model.bin",), ("tf_model.h5",)])
def test_pickled_weights_are_never_read(sound: Path, tmp_path: Path, files: tuple[str, ...]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sound, folder)
    (folder / "model.safetensors").unlink()
    for file in files:
        torch.save(weights_of(sound), folder / file)
    with pytest.raises(UserError, match=r"has no model.safetensors \(pickled weights are never read\); make one"):
        load_model(str(folder))


@pytest.mark.parametrize(("change", "problem"), [REFUSED[0], REFUSED[6]])
def test_no_command_answers_from_weights_that_were_not_loaded(
    sound: Path, store: TokenStore, tmp_path: Path, change: Callable[[Weights], Weights], problem: str
) -> None:
    folder = changed(sound, tmp_path / "model", change)
    (tmp_path / "text.txt").write_text("".join(SENTENCES))
    training = arguments(
        store.path, tmp_path / "run", from_scratch=None, config_overrides=None, model=folder, max_steps=1
    )
    for command, line in (
        (generate.main, [str(folder), "--prompt", "The", "--device", "cpu"]),
        (evaluate.main, [str(folder), "--dataset", str(tmp_path / "text.txt"), "--device", "cpu"]),
        (train.main, training),
    ):
        with pytest.raises(UserError, match=f"{folder}: .*{problem}"):
            command(line)
