"""What a model starts from, read in ranges: trained weights of a Hugging Face model, or random ones drawn from a seed.

An engine fills its shards with either as it does from a checkpoint, and no process ever holds a model that it need not:
transformers would load or draw all of it in every process, and fill what a file lacks with random numbers.
"""

from __future__ import annotations

import contextlib
import copy
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils.hub import cached_file

from wikift.base import hub
from wikift.base.errors import UserError, one_line
from wikift.base.files import read_range
from wikift.base.folders import read_json
from wikift.base.tensorfile import ITEM_BYTES, read_header, torch_dtype
from wikift.base.world import seed

HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"
_DRAWN_TOGETHER = _READ_TOGETHER = 1 << 20  # elements of one random stream; of two tensors that are compared
# What torch.compile, DDP, FSDP and people's own modules put into the names of a model's weights.
_WRAPPERS = ("_orig_mod", "module", "model", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_BUFFER = re.compile(r"transformer\.h\.\d+\.attn\.(masked_)?bias")  # the causal mask, which old files hold

ReadWeight = Callable[[str, int, int], Tensor]  # (name, start, stop) -> elements of the flattened tensor, fp32
Say = Callable[[str], None]


def random_weights(config: GPT2Config, shapes: dict[str, tuple[int, ...]], run_seed: int) -> ReadWeight:
    """GPT-2's initial weights (transformers' rule), any range of which is a pure function of the seed and its position.

    Normal with `initializer_range`; the two projections that end in the residual stream divided by sqrt(2 * n_layer)
    (Radford et al. 2019, section 2.3); LayerNorm gains one, biases zero.
    """

    def weight(name: str, start: int, stop: int) -> Tensor:
        if name.endswith(".bias"):
            return torch.zeros(stop - start)
        if ".ln_" in name:
            return torch.ones(stop - start)
        deviation = config.initializer_range
        if name.endswith(".c_proj.weight"):
            deviation /= math.sqrt(2 * config.n_layer)
        values = torch.empty(stop - start)
        count = math.prod(shapes[name])
        for piece in range(start // _DRAWN_TOGETHER, -(-stop // _DRAWN_TOGETHER)):
            first = piece * _DRAWN_TOGETHER
            generator = torch.Generator().manual_seed(seed(run_seed, "initial weights", name, piece))
            drawn = torch.empty(min(_DRAWN_TOGETHER, count - first)).normal_(0.0, deviation, generator=generator)
            low, high = max(start, first), min(stop, first + len(drawn))
            values[low - start : high - start] = drawn[low - first : high - first]
        return values

    return weight


class TrainedWeights(NamedTuple):
    """Weights in files, and the configuration that they are of.

    It has the files' dtype where it had none, and the head untied where the files hold another than the embedding.
    """

    config: GPT2Config
    read: ReadWeight


class _Stored(NamedTuple):
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes


def trained_weights(name: str, config: GPT2Config, setting: str, say: Say) -> TrainedWeights:
    """The weights of a Hugging Face model by name or folder, read from its safetensors files range by range.

    Raises UserError where the files are missing, damaged, or not exactly those of the model that `config` describes;
    so does reading a range of numbers that are not all finite.
    """
    problem = f"{setting} {name}: "
    with explained(name, setting), torch.device("meta"):
        shapes = {key: tuple(p.shape) for key, p in GPT2LMHeadModel(config).named_parameters()}
    files = _weight_files(name, setting)
    stored, unexpected = _stored_by_name(files, {*shapes, HEAD}, problem, say)

    def read(key: str, start: int, stop: int) -> Tensor:
        file, dtype, _, offset = stored[key]
        values = torch.empty(stop - start, dtype=torch_dtype(dtype))
        read_range(file, offset + start * values.itemsize, memoryview(values.view(torch.uint8).numpy().data))
        values = values.float()
        # a sum is one pass without memory; that of large finite numbers may overflow
        if not math.isfinite(values.sum()) and not values.isfinite().all():
            raise UserError(f"{problem}{key} holds NaN or infinity: the run that saved it failed; name an earlier one")
        return values

    config = copy.deepcopy(config)
    if config.tie_word_embeddings and HEAD in stored:
        if EMBEDDING not in stored:
            stored[EMBEDDING] = stored[HEAD]
        elif stored[HEAD][1:3] != stored[EMBEDDING][1:3] or not _equal(read, stored[HEAD].shape):
            say(f"{problem}{HEAD} is not the embedding, so that it is not tied to it as config.json says")
            shapes[HEAD], config.tie_word_embeddings = shapes[EMBEDDING], False
    missing = [key for key in shapes if key not in stored]
    wrong = [
        f"{key} is {s.dtype} {list(s.shape)} and not F32, F16 or BF16 {list(shapes[key])}"
        for key, s in stored.items()
        if key in shapes and (s.shape != shapes[key] or s.dtype not in ITEM_BYTES)
    ]
    where = problem + (files[0].name if len(files) == 1 else "its safetensors files")
    kinds = {"lacks": missing, "holds what a GPT-2 has not:": unexpected, "does not fit config.json:": wrong}
    if problems := [f"{where} {kind} {_few(names)}" for kind, names in kinds.items() if names]:
        raise UserError(*problems)
    config.dtype = config.dtype or torch_dtype(stored[EMBEDDING].dtype)
    return TrainedWeights(config, read)


def _stored_by_name(files: list[Path], names: set[str], problem: str, say: Say) -> tuple[dict[str, _Stored], list[str]]:
    """Tensors by the model's `names`, and what else the files hold, by its own name."""
    stored: dict[str, _Stored] = {}
    unexpected, removed = list[str](), set[str]()
    for file in files:
        try:
            with open(file, "rb") as opened:
                if opened.read(40).startswith(b"version https://git-lfs."):
                    raise UserError(f"{problem}{file.name} is a Git LFS pointer, not the weights; run: git lfs pull")
            header, _ = read_header(file)
        except (OSError, ValueError) as error:
            raise UserError(f"{problem}{file.name} cannot be read ({error}); copy or download it again") from None
        for own, entry in header.items():
            parts = own.split(".")
            key = ".".join(part for part in parts if part not in _WRAPPERS)
            if not key.startswith(("transformer.", "lm_head.")):
                key = f"transformer.{key}"  # the Hub's gpt2 is saved without its head
            if key in names and key not in stored:
                stored[key] = _Stored(file, *entry)
                removed.update(part + "." for part in parts if part in _WRAPPERS)
            elif not _BUFFER.fullmatch(key):
                unexpected.append(own)
    if removed:
        say(f"{problem}removed {', '.join(sorted(removed))} from the names of its weights")
    return stored, unexpected


def _equal(read: ReadWeight, shape: tuple[int, ...]) -> bool:
    count = math.prod(shape)
    spans = [(start, min(start + _READ_TOGETHER, count)) for start in range(0, count, _READ_TOGETHER)]
    return all(torch.equal(read(HEAD, *span), read(EMBEDDING, *span)) for span in spans)


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _weight_files(name: str, setting: str) -> list[Path]:
    folder = hub.fetch(name, setting, hub.WEIGHTS)

    def fetch(file: str) -> Path | None:
        with explained(name, setting):
            options: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False}
            path = cached_file(str(folder), file, **options)
        return None if path is None else Path(path)

    if single := fetch("model.safetensors"):
        return [single]
    index = fetch("model.safetensors.index.json")
    if index is None:
        raise UserError(
            f"{setting} {name}: has no model.safetensors (pickled weights are never read); make one with transformers: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    parts = {file: fetch(file) for file in sorted(set(read_json(index).get("weight_map", {}).values()))}
    if not parts or None in parts.values():
        missing = _few([file for file, path in parts.items() if path is None]) or "its weight_map"
        raise UserError(
            f"{setting} {name}: {index.name} names files that are missing: {missing}; copy or download them again"
        )
    return [path for path in parts.values() if path is not None]


@contextlib.contextmanager
def explained(name: str, setting: str) -> Iterator[None]:
    """transformers' long errors about a missing model, in one line with the way out."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(
            f"{setting} {name}: cannot be loaded ({one_line(error)}); name a Hugging Face GPT-2 folder"
        ) from None
