"""GPT-2's dimensions and what follows from them, known before torch is imported."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from wikift.base.errors import UserError, nearest

# layers, heads, width: the released models (Radford et al. 2019, table 2; Sanh et al. 2019 for distilgpt2)
_RELEASED = {
    "distilgpt2": (6, 12, 768),
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}
RELEASED = tuple(_RELEASED)

# What --config-overrides may set, with the type of each (the names of transformers' GPT2Config).
OVERRIDES: dict[str, type] = {
    "n_layer": int,
    "n_head": int,
    "n_embd": int,
    "n_inner": int,
    "n_positions": int,
    "vocab_size": int,
    "activation_function": str,
    "layer_norm_epsilon": float,
    "initializer_range": float,
    "resid_pdrop": float,
    "embd_pdrop": float,
    "attn_pdrop": float,
}
ACTIVATIONS = ("gelu_new", "gelu", "gelu_pytorch_tanh", "relu", "silu", "tanh")  # of transformers' ACT2FN


@dataclasses.dataclass(frozen=True)
class Shape:
    """The dimensions that decide size, speed and fit. `vocab_size` is in tokens, `n_positions` in tokens of context."""

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_positions: int = 1024
    vocab_size: int = 50257
    n_inner: int | None = None

    @property
    def parameters(self) -> int:
        """Count of trained numbers, the tied head counted once (gpt2: 124,439,808)."""
        width, inner = self.n_embd, self.n_inner or 4 * self.n_embd
        attention = width * 3 * width + 3 * width + width * width + width
        block = attention + 2 * width * inner + inner + width + 4 * width
        return (self.vocab_size + self.n_positions) * width + self.n_layer * block + 2 * width

    def flops_per_token(self, block_size: int) -> float:
        """Forward and backward, PaLM's count (arXiv:2204.02311, appendix B): 6 N + 12 L T d, attention uncausal.

        N is all parameters, as nanoGPT counts them less the positions: gpt2 at T = 1,024 is 855 MFLOP.
        """
        counted = self.parameters - self.n_positions * self.n_embd
        return 6.0 * counted + 12.0 * self.n_layer * block_size * self.n_embd


def released_name(model: str) -> str | None:
    """`openai-community/gpt2-xl@main` -> `gpt2-xl`; None where it is not one of OpenAI's or the distilled one."""
    name = model.partition("@")[0].removeprefix("openai-community/").removeprefix("distilbert/")
    return name if name in _RELEASED else None


def shape_of(model: str) -> Shape | None:
    """The shape of a released model or of a model folder; None for a name that only the Hub can tell.

    Raises UserError where a folder has no readable GPT-2 `config.json`.
    """
    name = released_name(model)
    if name is not None and not Path(model).is_dir():
        layers, heads, width = _RELEASED[name]
        return Shape(n_layer=layers, n_head=heads, n_embd=width)
    if not Path(model).is_dir():
        return None
    path = Path(model) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--model {model}: has no config.json; name a Hugging Face model folder (RUN/hf)") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--model {model}: config.json cannot be read ({error})") from None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "gpt2":
        raise UserError(f"--model {model}: config.json says model_type {kind!r}; wikift trains gpt2 models only")
    dimensions = {f.name: config[f.name] for f in dataclasses.fields(Shape) if f.name in config}
    problems = [
        f"--model {model}: config.json says {name} {value!r}, which must be a whole number of 1 or more"
        for name, value in dimensions.items()
        if not (type(value) is int and value >= 1) and not (name == "n_inner" and value is None)
    ]
    if problems:
        raise UserError(*problems)
    return with_overrides(Shape(), dimensions)


def with_overrides(shape: Shape, overrides: dict[str, Any]) -> Shape:
    """`shape` with those of `overrides` that are dimensions."""
    names = {f.name for f in dataclasses.fields(Shape)}
    return dataclasses.replace(shape, **{k: v for k, v in overrides.items() if k in names})


def parse_overrides(text: str) -> dict[str, Any]:
    """`n_layer=2,n_head=4` -> {"n_layer": 2, "n_head": 4}. Raises UserError naming every bad part."""
    overrides: dict[str, Any] = {}
    problems = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, value = (p.strip() for p in part.partition("="))
        if not equals or name not in OVERRIDES:
            names = f"one of {', '.join(OVERRIDES)}{nearest(name, tuple(OVERRIDES))}"
            problems.append(f"--config-overrides {part}: must be NAME=VALUE, NAME {names}")
        elif name in overrides:
            problems.append(f"--config-overrides {part}: {name} is set twice; remove one")
        else:
            try:
                overrides[name] = OVERRIDES[name](value)
            except ValueError:
                overrides[name] = None
            if not _may_be(name, overrides[name]):
                problems.append(f"--config-overrides {part}: {name} must be {_rule(name)}")
    if problems:
        raise UserError(*problems)
    return overrides


def _may_be(name: str, value: Any) -> bool:
    """Whether `value` (None where it has not the right type) is one that the override `name` can have."""
    if value is None or OVERRIDES[name] is str:
        return value in ACTIVATIONS
    if OVERRIDES[name] is int:
        return bool(value >= 1)
    return bool(0 <= value < 1 if name.endswith("pdrop") else 0 < value < math.inf)


def _rule(name: str) -> str:
    if OVERRIDES[name] is str:
        return f"one of {', '.join(ACTIVATIONS)}"
    if OVERRIDES[name] is int:
        return "a whole number of 1 or more"
    return "a number, at least 0 and below 1" if name.endswith("pdrop") else "a number above 0"
