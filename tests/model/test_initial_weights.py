"""No answer from weights that were not loaded: one reader for train, its --dry-run, evaluate and generate."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2LMHeadModel

from tests.tiny import arguments
from tests.trained import SENTENCES
from wikift.base.errors import UserError
from wikift.base.shape import EMBEDDING, HEAD
from wikift.commands import evaluate, generate, train
from wikift.data.store import TokenStore
from wikift.model.gpt2 import load_config, load_model
from wikift.model.initial_weights import trained_weights

FC = "transformer.h.1.mlp.c_fc.weight"
Weights = dict[str, Tensor]
Change = Callable[[Weights], Weights]


def weights_of(folder: Path) -> Weights:
    return dict(load_file(folder / "model.safetensors"))


def rewrite(folder: Path, change: Change) -> Path:
    """Change the tensors in the model's file."""
    tensors = {name: tensor.clone().contiguous() for name, tensor in change(weights_of(folder)).items()}
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


def by_every_command(folder: Path, store: TokenStore) -> list[str]:
    """What train --dry-run, train, evaluate and generate say of a model that they refuse."""
    (text := store.path.parent / "text.txt").write_text("".join(SENTENCES))
    run = folder.parent / "run"
    training = arguments(store.path, run, from_scratch=None, config_overrides=None, model=folder, max_steps=1)
    said = []
    for main, line in (
        (train.main, [*training, "--dry-run"]),
        (train.main, training),
        (evaluate.main, [str(folder), "--dataset", str(text), "--device", "cpu"]),
        (generate.main, [str(folder), "--prompt", "The", "--device", "cpu"]),
    ):
        with pytest.raises(UserError) as caught:
            main(line)
        (problem,) = caught.value.problems
        said.append(re.sub(rf"^(--model|MODEL) {re.escape(str(folder))}: ", "", problem))
    assert not run.exists()
    return said


def prefixed(prefix: str) -> Change:
    return lambda weights: {prefix + name: tensor for name, tensor in weights.items()}


def without_prefix(weights: Weights) -> Weights:
    """As the Hub's gpt2: no `transformer.`, and the causal masks of old releases."""
    bare = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    masks = {"h.0.attn.bias": torch.ones(1, 1, 16, 16).tril().bool(), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    return bare | masks


READ_ALIKE: list[tuple[Change, str]] = [
    (lambda weights: weights, ""),
    (prefixed("_orig_mod."), "removed _orig_mod. from"),  # saved from a compiled model
    (prefixed("module._orig_mod.net."), "removed _orig_mod., module.net. from"),  # in DDP, in a class of one's own
    (lambda weights: {n.replace(".h.", ".h._fsdp_wrapped_module."): t for n, t in weights.items()}, "removed _fsdp"),
    (lambda weights: {n.replace(".mlp", "._orig_mod.mlp"): t for n, t in weights.items()}, "removed _orig_mod. from"),
    (without_prefix, ""),
    (lambda weights: weights | {HEAD: weights[EMBEDDING]}, ""),
    (lambda weights: {HEAD if name == EMBEDDING else name: tensor for name, tensor in weights.items()}, ""),
]


@pytest.mark.parametrize(("change", "note"), READ_ALIKE)
def test_a_model_is_read_by_whatever_names_its_file_has(sound: Path, folder: Path, change: Change, note: str) -> None:
    lines: list[str] = []
    loaded, ranges = read_both_ways(rewrite(folder, change), lines.append)
    original = weights_of(sound)
    assert set(loaded) == set(original)
    for name, tensor in original.items():
        assert torch.equal(loaded[name], tensor), name
        assert torch.equal(ranges[name], tensor), name
    assert len(lines) == bool(note)
    assert note in "".join(lines)


def halved(dtype: torch.dtype) -> Change:
    return lambda weights: {name: tensor.to(dtype) for name, tensor in weights.items()}


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (halved(torch.bfloat16), ""),
        (halved(torch.float16), ""),
        (lambda weights: weights | {HEAD: weights[EMBEDDING] * 2}, "not tied"),  # whatever config.json says
        (lambda weights: weights | {FC: torch.full_like(weights[FC], 3e38)}, ""),  # whose sum overflows
    ],
)
def test_weights_are_those_that_transformers_reads(folder: Path, change: Change, note: str) -> None:
    lines: list[str] = []
    rewrite(folder, change)
    theirs = dict(GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).named_parameters())
    for weights in read_both_ways(folder, lines.append):
        assert set(weights) == set(theirs)
        assert all(torch.equal(weights[name], parameter) for name, parameter in theirs.items())
    assert len(lines) == bool(note)
    assert note in "".join(lines)


def with_value(value: float) -> Change:
    def change(weights: Weights) -> Weights:
        weights[FC][0, 0] = value
        return weights

    return change


REFUSED: list[tuple[Change, str]] = [
    (lambda w: {n: t for n, t in w.items() if n != FC}, rf"lacks {FC}; copy or download it again$"),
    (lambda w: {n: t for n, t in w.items() if ".h." not in n}, r"lacks transformer.h.0.ln_1.weight, .* and 21 more"),
    (
        lambda w: w | {"score.weight": torch.zeros(2, 32)},
        "has not: score.weight; to remove that: python -c '.*then name",
    ),
    (lambda w: prefixed("module.")(w) | {"score.weight": torch.zeros(2, 32)}, "has not: score.weight$"),
    (lambda w: w | {"module." + FC: w[FC]}, rf"holds what a GPT-2 has not: (module\.)?{FC}"),  # twice
    (lambda w: w | {FC: w[FC].t()}, rf"does not fit config.json: {FC} is F32 \[128, 32\] .* \[32, 128\]"),
    (lambda w: w | {FC: w[FC].double()}, rf"does not fit config.json: {FC} is F64 \[32, 128\] and not F32"),
    (with_value(math.nan), f"{FC} holds NaN or infinity"),
    (with_value(-math.inf), f"{FC} holds NaN or infinity"),
]


@pytest.mark.parametrize(("change", "problem"), REFUSED)
def test_weights_that_are_not_the_models_are_refused(folder: Path, change: Change, problem: str) -> None:
    rewrite(folder, change)
    with pytest.raises(UserError, match=rf"^NAME {folder}: .*{problem}"):
        load_model(str(folder), setting="NAME")
    with pytest.raises(UserError, match=rf"^NAME {folder}: .*{problem}"):  # as train reads it
        trained_weights(str(folder), load_config(str(folder)), "NAME", lambda line: None).read(FC, 0, 32 * 128)


def in_several_files(folder: Path) -> list[Path]:
    GPT2LMHeadModel.from_pretrained(folder).save_pretrained(folder, max_shard_size="30KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    return sorted(folder.glob("model-0*"))


def test_weights_in_several_files(sound: Path, folder: Path) -> None:
    assert len(in_several_files(folder)) > 2
    for weights in read_both_ways(folder):
        assert all(torch.equal(weights[name], tensor) for name, tensor in weights_of(sound).items())


def damaged(change: Callable[[bytes], bytes], name: str = "model.safetensors") -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def misled(index: Path) -> None:
    index.write_text(index.read_text().replace('"model-00002', '"../model-00002'))


def renamed(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.safetensors").rename(folder / name)


def configured(**values: object) -> Callable[[Path], object]:
    def act(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return act


def foreign(name: str) -> Callable[[Path], object]:
    """A folder with one file, which is no Hugging Face model."""

    def act(folder: Path) -> None:
        shutil.rmtree(folder)
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text('{"base_model_name_or_path": "distilgpt2"}')

    return act


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 548105171\n".encode()
IN_FOUR = "transformers<5"
WAYS_OUT: list[tuple[Callable[[Path], object], str]] = [
    (damaged(lambda b: b[: len(b) // 2]), r"model.safetensors cannot be read .*\d+ bytes of \d+\); copy or download"),
    (damaged(lambda b: b""), "model.safetensors cannot be read"),
    (damaged(lambda b: bytes([2, *[0] * 7]) + b"[]"), r"model.safetensors cannot be read \(no JSON object\)"),
    (damaged(lambda b: b.replace(b'"shape":[32,128]', b'"shape":[32,127]')), r"cannot be read .*F32 \[32, 127\]"),
    (damaged(lambda b: POINTER), "model.safetensors is a Git LFS pointer, not the file; run: git -C .* lfs pull"),
    (damaged(lambda b: POINTER, "config.json"), "config.json is a Git LFS pointer"),
    (damaged(lambda b: b"{", "config.json"), "config.json cannot be read"),
    (lambda f: in_several_files(f)[1].unlink(), r"missing: model-00002-of-\d+.safetensors; .*hf download"),
    (lambda f: (in_several_files(f), (f / "model.safetensors.index.json").unlink()), "without model.safetensors.index"),
    (
        lambda f: (in_several_files(f), misled(f / "model.safetensors.index.json")),
        r"model.safetensors.index.json cannot be read \(it names '../model-00002.*', which is no file of the folder\)",
    ),
    (renamed("model-00001-of-00002.safetensors"), "00001-of-00002.safetensors without model.safetensors.index"),
    (renamed("my.safetensors"), "run: mv .*/my.safetensors .*/model.safetensors"),
    (renamed("tf_model.h5"), f"{IN_FOUR}.*python -c '.*from_tf=True"),
    (renamed("flax_model.msgpack"), f"{IN_FOUR}.*python -c '.*from_flax=True"),
    (renamed("gpt2.Q4.gguf"), "python -c '.*gguf_file=.gpt2.Q4.gguf"),
    (foreign("adapter_config.json"), "a PEFT adapter.*python -c '.*merge_and_unload.*from_pretrained..distilgpt2"),
    (foreign("global_step1/zero_pp_rank_0_mp_rank_00_optim_states.pt"), "zero_to_fp32.py"),
    (foreign(".metadata"), "dcp_to_torch"),
    (foreign("README.md"), r"has no config.json \(there: README.md\)"),
    (configured(model_type="llama"), "model_type 'llama'; wikift knows gpt2 models only"),
    (configured(add_cross_attention=True), "add_cross_attention"),
    (configured(quantization_config={"bits": 8}), "quantization_config, and wikift reads no quantized weights; load"),
    (damaged(lambda b: (1 << 60).to_bytes(8, "little") + b[8:]), f"header of {1 << 60} bytes in a file of"),
    (damaged(lambda b: b"[" * 100_000, "config.json"), "config.json cannot be read"),
    (configured(tie_word_embeddings=False), f"lacks {HEAD}"),
    (configured(activation_function="foo"), "activation_function 'foo', which is none of gelu_new, gelu, "),
    (configured(n_head=5), "n_head=5: must divide n_embd=32"),
]


@pytest.mark.parametrize(("damage", "problem"), WAYS_OUT)
def test_every_command_says_the_way_out(
    folder: Path, store: TokenStore, damage: Callable[[Path], object], problem: str
) -> None:
    damage(folder)
    said = by_every_command(folder, store)
    assert len(set(said)) == 1, said
    assert re.search(problem, said[0]), said[0]
