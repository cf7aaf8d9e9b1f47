"""What a model starts from, read in ranges: trained weights of a Hugging Face model, or random ones drawn from a seed.

An engine fills its shards with either as it does from a checkpoint, and no process ever holds a model that it need not:
transformers would load or draw all of it in every process, and fill what a file lacks with random numbers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import GPT2Config

from wikift.base.errors import UserError
from wikift.base.files import read_range
from wikift.base.model_files import check_exported, open_model
from wikift.base.shape import EMBEDDING
from wikift.base.tensorfile import torch_dtype
from wikift.base.world import seed

_DRAWN_TOGETHER = 1 << 20  # elements of one random stream

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


def trained_weights(name: str, config: GPT2Config, setting: str, say: Say) -> TrainedWeights:
    """The weights of a Hugging Face model by name or folder, read from its safetensors files range by range.

    Raises what `open_model` and `check_exported` do; so does reading a range of numbers that are not all finite.
    """
    shape, stored, notes = open_model(name, setting)
    check_exported(name, setting)
    for note in notes:
        say(note)

    def read(key: str, start: int, stop: int) -> Tensor:
        file, dtype, _, offset = stored[key]
        values = torch.empty(stop - start, dtype=torch_dtype(dtype))
        read_range(file, offset + start * values.itemsize, memoryview(values.view(torch.uint8).numpy().data))
        values = values.float()
        # a sum is one pass without memory; that of large finite numbers may overflow
        if not math.isfinite(values.sum()) and not values.isfinite().all():
            raise UserError(f"{setting} {name}: {key} holds NaN or infinity: its run has failed; name an earlier one")
        return values

    config = copy.deepcopy(config)
    config.tie_word_embeddings = shape.tie_word_embeddings
    config.dtype = config.dtype or torch_dtype(stored[EMBEDDING].dtype)
    return TrainedWeights(config, read)
