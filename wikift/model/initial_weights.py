"""What a run starts from, read in ranges: trained weights of a Hugging Face model, or random ones drawn from the seed.

Both are FragmentReaders, as a checkpoint is, so an engine fills its shards in one way only, and no process ever holds
a model that it need not: `transformers` would load or draw the whole of it in every process.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config
from transformers.utils.hub import cached_file

from wikift.base.errors import UserError
from wikift.base.files import read_range
from wikift.base.folders import read_json
from wikift.base.tensorfile import ITEM_BYTES, read_header, torch_dtype
from wikift.base.world import seed
from wikift.model.gpt2 import explained

_DRAWN_TOGETHER = 1 << 20  # elements of one random stream

ReadWeight = Callable[[str, int, int], Tensor]


def random_weights(config: GPT2Config, shapes: dict[str, tuple[int, ...]], run_seed: int) -> ReadWeight:
    """GPT-2's initial weights (transformers' rule), any range of which is a pure function of the seed and its place.

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


def trained_weights(model: str, shapes: dict[str, tuple[int, ...]]) -> ReadWeight:
    """The weights of a Hugging Face model by name or folder, read from its safetensors files range by range.

    Raises UserError where the folder has no such files or they do not hold the model that its configuration names.
    """
    files = _weight_files(model)
    places: dict[str, tuple[Path, str, tuple[int, ...], int]] = {}
    for file in files:
        try:
            header, _ = read_header(file)
        except (OSError, ValueError) as error:
            raise UserError(
                f"--model {model}: {file.name} cannot be read ({error}); copy or download it again"
            ) from None
        places |= {name: (file, *entry) for name, entry in header.items()}
    problems = []
    found: dict[str, tuple[Path, str, tuple[int, ...], int]] = {}
    for name, shape in shapes.items():
        place = places.get(name) or places.get(name.removeprefix("transformer."))  # the Hub's gpt2 has no prefix
        if place is None:
            problems.append(f"--model {model}: {name} is not in {', '.join(file.name for file in files)}")
        elif place[2] != shape or place[1] not in ITEM_BYTES:
            problems.append(
                f"--model {model}: {name} is {place[1]} {list(place[2])}, config.json makes it {list(shape)}"
            )
        else:
            found[name] = place
    if problems:
        raise UserError(*problems[:3], *([f"... and {len(problems) - 3} more tensors"] if len(problems) > 3 else []))

    def weight(name: str, start: int, stop: int) -> Tensor:
        file, code, _, offset = found[name]
        values = torch.empty(stop - start, dtype=torch_dtype(code))
        read_range(file, offset + start * values.itemsize, memoryview(values.view(torch.uint8).numpy().data))
        return values.float()

    return weight


def _weight_files(model: str) -> list[Path]:
    def fetch(name: str) -> Path | None:
        with explained(model, "--model"):
            options: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False}
            path = cached_file(model, name, **options)
        return None if path is None else Path(path)

    single = fetch("model.safetensors")
    if single is not None:
        return [single]
    index = fetch("model.safetensors.index.json")
    if index is None:
        raise UserError(
            f"--model {model}: has no model.safetensors (pickled weights are never read); make one with transformers: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    parts = [fetch(name) for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
    if None in parts or not parts:
        raise UserError(f"--model {model}: files that {index.name} names are missing; copy or download them again")
    return [part for part in parts if part is not None]
