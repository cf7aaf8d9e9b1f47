"""GPT-2's dimensions and what follows from them, known before torch is imported."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
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
EMBEDDING, HEAD = "transformer.wte.weight", "lm_head.weight"
_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}  # of transformers' GPT2Config

ACTIVATIONS = ("gelu_new", "gelu", "gelu_pytorch_tanh", "relu", "silu", "tanh")  # of transformers' ACT2FN
_RARE = "gelu_10 gelu_accurate gelu_fast gelu_python hardswish laplace leaky_relu linear mish quick_gelu"
OF_CONFIGS = (*ACTIVATIONS, *_RARE.split(), "relu2", "relu6", "sigmoid", "swish")  # of models that exist
# What --config-overrides may set (the names of transformers' GPT2Config): the type, what holds of it, the same in words
_COUNT = (int, lambda value: value >= 1, "a whole number of 1 or more")
_POSITIVE = (float, lambda value: 0 < value < math.inf, "a number above 0")
_RATE = (float, lambda value: 0 <= value < 1, "a number, at least 0 and below 1")
OVERRIDES: dict[str, tuple[type, Callable[[Any], bool], str]] = {
    **dict.fromkeys(("n_layer", "n_head", "n_embd", "n_inner", "n_positions", "vocab_size"), _COUNT),
    "activation_function": (str, lambda value: value in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}"),
    **dict.fromkeys(("layer_norm_epsilon", "initializer_range"), _POSITIVE),
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), _RATE),
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """The dimensions that decide size, speed and fit. `vocab_size` is in tokens, `n_positions` in tokens of context."""

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_positions: int = 1024
    vocab_size: int = 50257
    n_inner: int | None = None
    tie_word_embeddings: bool = True  # one tensor is embedding and head

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every trained tensor by Hugging Face name, a tied head left out."""
        width, inner = self.n_embd, self.n_inner or 4 * self.n_embd
        linear = {"attn.c_attn": (width, 3 * width), "attn.c_proj": (width, width),
                  "mlp.c_fc": (width, inner), "mlp.c_proj": (inner, width)}  # fmt: skip
        tensors: dict[str, tuple[int, ...]] = {EMBEDDING: (self.vocab_size, width)}
        tensors["transformer.wpe.weight"] = (self.n_positions, width)
        norms = [f"h.{layer}.ln_{number}" for layer in range(self.n_layer) for number in (1, 2)]
        for name in (*norms, "ln_f"):
            tensors |= {f"transformer.{name}.weight": (width,), f"transformer.{name}.bias": (width,)}
        for layer in range(self.n_layer):
            for name, (rows, columns) in linear.items():
                tensors[f"transformer.h.{layer}.{name}.weight"] = (rows, columns)
                tensors[f"transformer.h.{layer}.{name}.bias"] = (columns,)
        return tensors if self.tie_word_embeddings else {**tensors, HEAD: tensors[EMBEDDING]}

    @property
    def parameters(self) -> int:
        """Count of trained numbers, a tied head counted once (gpt2: 124,439,808)."""
        return sum(map(math.prod, self.tensors.values()))

    def flops_per_token(self, block_size: int) -> float:
        """Forward and backward, PaLM's count (arXiv:2204.02311, appendix B): 6 N + 12 L T d, attention uncausal.

        N is all parameters, as nanoGPT counts them less what is only looked up, positions and the embedding of an
        untied head: gpt2 at T = 1,024 is 855 MFLOP.
        """
        looked_up = self.n_positions + (0 if self.tie_word_embeddings else self.vocab_size)
        counted = self.parameters - looked_up * self.n_embd
        return 6.0 * counted + 12.0 * self.n_layer * block_size * self.n_embd


def released_name(model: str) -> str | None:
    """`openai-community/gpt2-xl@main` -> `gpt2-xl`; None where it is not one of OpenAI's or the distilled one."""
    name = model.partition("@")[0].removeprefix("openai-community/").removeprefix("distilbert/")
    return name if name in _RELEASED else None


def released_shape(model: str) -> Shape | None:
    return Shape(*_RELEASED[name]) if (name := released_name(model)) else None


def shape_of_config(config: dict[str, Any], where: str) -> Shape:
    """The shape in a `config.json`. Raises UserError where it is not that of a GPT-2, or makes no sense."""
    if (kind := config.get("model_type")) != "gpt2":
        raise UserError(f"{where}: config.json says model_type {kind!r}; wikift knows gpt2 models only: name gpt2, say")
    config = {_ALIASES.get(key, key): value for key, value in config.items()}
    config["tie_word_embeddings"] = bool(config.get("tie_word_embeddings", True))
    shape = with_overrides(Shape(), config)
    problems = [
        f"{where}: config.json says {name} {value!r}, which must be a whole number of 1 or more"
        for name, value in dataclasses.asdict(shape).items()
        if name != "tie_word_embeddings"
        and not (type(value) is int and value >= 1)
        and not (name == "n_inner" and value is None)
    ]
    if config.get("quantization_config"):
        fix = "load it with transformers, call dequantize() and save_pretrained, and name that folder"
        problems.append(f"{where}: config.json says quantization_config, and wikift reads no quantized weights; {fix}")
    if config.get("add_cross_attention"):
        problems.append(f"{where}: config.json says add_cross_attention, of which wikift trains none; name another")
    if (activation := config.get("activation_function", "gelu_new")) not in OF_CONFIGS:
        known = f"which is none of {', '.join(OF_CONFIGS)}; fix it"
        problems.append(f"{where}: config.json says activation_function {activation!r}, {known}")
    if problems := problems or head_problems(shape, f"{where}: config.json says "):
        raise UserError(*problems)
    return shape


def head_problems(shape: Shape, setting: str) -> list[str]:
    if shape.n_embd % shape.n_head == 0:
        return []
    fits = math.gcd(shape.n_embd, shape.n_head)
    return [f"{setting}n_head={shape.n_head}: must divide n_embd={shape.n_embd}; try n_head={fits}"]


def with_overrides(shape: Shape, overrides: dict[str, Any]) -> Shape:
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
            kind, holds, rule = OVERRIDES[name]
            try:
                overrides[name] = kind(value)
            except ValueError:
                overrides[name] = None
            if overrides[name] is None or not holds(overrides[name]):
                problems.append(f"--config-overrides {part}: {name} must be {rule}")
    if problems:
        raise UserError(*problems)
    return overrides
