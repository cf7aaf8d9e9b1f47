"""GPT-2's weights under any wrapper's names, and the dimensions that their shapes tell."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wikift.base.errors import UserError

# What DDP, DeepSpeed, FSDP, torch.compile, checkpoint wrappers and state dicts put into names; GPT-2 has none of these.
_WRAPPERS = {"module", "model", "app", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_BESIDE = {"optimizer", "optimizers", "optim", "lr_scheduler", "scheduler", "rng", "train_state", "dataloader"}
_MASK = re.compile(r"h\.\d+\.attn\.(?:masked_)?bias")  # buffers of old versions
_BLOCK = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")


def plain_names(names: Sequence[str], where: Path) -> dict[str, str]:
    """Each weight's name in `names` by its Hugging Face name, optimizer state left out.

    Raises UserError where something is no weight of GPT-2, or two are the same.
    """
    found: dict[str, str] = {}
    strange = []
    for name in names:
        words = name.split(".")
        plain = ".".join(word for word in words if word not in _WRAPPERS).removeprefix("transformer.")
        if _BESIDE & set(words) or _MASK.fullmatch(plain):
            continue
        if plain != "lm_head.weight":
            plain = f"transformer.{plain}"
        if not re.fullmatch(rf"lm_head\.weight|transformer\.(wte\.weight|wpe\.weight|{_parts()})", plain):
            strange.append(name)
        elif plain in found:
            raise UserError(f"{where}: {found[plain]} and {name} are both {plain}; wikift cannot tell which to take")
        found[plain] = name
    if strange:
        raise UserError(f"{where}: is no GPT-2: it holds {', '.join(strange[:3])} ({len(strange)} such tensors)")
    return found


def dimensions(shapes: Mapping[str, tuple[int, ...]], where: Path) -> dict[str, int]:
    """n_layer, n_embd, vocab_size, n_positions and n_inner, as the weights' shapes (by Hugging Face name) have them.

    Raises UserError where a weight is missing or has another shape than the others ask for.
    """
    layers = 1 + max((int(name.split(".")[2]) for name in shapes if name.startswith("transformer.h.")), default=-1)
    names = ordered_names(layers)
    missing = [name for name in names if name not in shapes]
    if missing or not layers:
        raise UserError(
            f"{where}: is no whole GPT-2: {', '.join(missing[:3]) or 'its blocks'} of {len(names)} are missing"
        )
    found = {
        "n_layer": layers,
        "n_embd": shapes["transformer.wte.weight"][-1],
        "vocab_size": shapes["transformer.wte.weight"][0],
        "n_positions": shapes["transformer.wpe.weight"][0],
        "n_inner": shapes["transformer.h.0.mlp.c_fc.weight"][-1],
    }
    width, inner = found["n_embd"], found["n_inner"]
    block: dict[str, tuple[int, ...]] = {
        "attn.c_attn.weight": (width, 3 * width),
        "attn.c_attn.bias": (3 * width,),
        "attn.c_proj.weight": (width, width),
        "mlp.c_fc.weight": (width, inner),
        "mlp.c_fc.bias": (inner,),
        "mlp.c_proj.weight": (inner, width),
    }
    for name in names:
        expected = block.get(name.split(".", 3)[-1], (width,))
        if name in ("transformer.wte.weight", "lm_head.weight"):
            expected = (found["vocab_size"], width)
        elif name == "transformer.wpe.weight":
            expected = (found["n_positions"], width)
        if shapes[name] != expected:
            raise UserError(f"{where}: {name} is {list(shapes[name])}, the other weights make it {list(expected)}")
    return found


def ordered_names(layers: int) -> list[str]:
    """The names of GPT-2's weights in transformers' order, the head (which may be tied) left out."""
    blocks = [f"h.{i}.{part}.{kind}" for i in range(layers) for part in _BLOCK for kind in ("weight", "bias")]
    return [f"transformer.{name}" for name in ("wte.weight", "wpe.weight", *blocks, "ln_f.weight", "ln_f.bias")]


def agreed_config(config: dict[str, Any], found: dict[str, int], source: str) -> dict[str, Any]:
    """`config` (a config.json's content) with the dimensions that the weights have.

    A vocabulary or context of another size is taken from the weights. Raises UserError where it is of another model.
    """
    problems = [
        f"{source}: {name} is {config[name]}, the weights have {found[name]}; name the model that was trained"
        for name in ("n_layer", "n_embd")
        if config.get(name, found[name]) != found[name]
    ]
    heads = config.get("n_head")
    if type(heads) is not int or heads < 1 or found["n_embd"] % heads:
        problems.append(f"{source}: n_head is {heads!r}, which must divide n_embd {found['n_embd']}; mend config.json")
    if problems:
        raise UserError(*problems)
    inner = None if found["n_inner"] == 4 * found["n_embd"] and not config.get("n_inner") else found["n_inner"]
    config = {**config, **found, "n_inner": inner}
    return {**config, "n_ctx": found["n_positions"]} if "n_ctx" in config else config


def _parts() -> str:
    parts = "|".join(part.replace(".", r"\.") for part in _BLOCK)
    return rf"(h\.\d+\.({parts})|ln_f)\.(weight|bias)"
