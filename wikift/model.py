"""GPT-2 from a name, a folder or nothing; its loss; the precision it computes in."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel

from wikift import hub
from wikift.config import TrainSettings
from wikift.errors import EnvironmentFault, UserError
from wikift.shape import Shape, parse_overrides
from wikift.world import seed

NOT_SCORED = -100
# Positions whose logits are held at once in validation. On a CPU 128 x 50,257 x 4 bytes stay below the 32 MiB where
# glibc starts to get memory afresh each time: page faults were two fifths of a validation's processor time (measured).
_SCORED_TOGETHER = {"cpu": 128, "cuda": 8192}
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Precision(NamedTuple):
    """What the products are computed in, why, and what the user should know about it (empty mostly)."""

    name: str
    reason: str
    warning: str = ""


def resolve_precision(requested: str, device: torch.device) -> Precision:
    """`auto` is bf16 where the device multiplies it natively, else fp32.

    A processor without AVX512-BF16 or AMX emulates bf16 products, measured 20 times slower than fp32.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        name = torch.cuda.get_device_name(device)
    else:
        native = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        name = "this processor"
    verb = "multiplies" if native else "does not multiply"
    if requested == "auto":
        return Precision("bf16" if native else "fp32", f"{name} {verb} bf16 natively")
    if requested == "bf16" and not native:
        return Precision(
            "bf16", "asked for", f"bf16 is emulated on {name}, up to 20 times slower; --precision auto is fp32"
        )
    if requested == "fp16" and device.type == "cpu":
        return Precision("fp16", "asked for", f"fp16 is slow on {name}; --precision auto is the fast choice")
    return Precision(requested, "asked for")


@contextlib.contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """Products in `precision` (bf16, fp16, fp32), weights and reductions in fp32."""
    with torch.autocast(device.type, dtype=_DTYPES[precision], enabled=precision != "fp32"):
        yield


class NextTokenLoss(nn.Module):
    """A language model and its loss in one module, so that DDP and torch.compile wrap both."""

    def __init__(self, model: GPT2LMHeadModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Per-token negative log-likelihood (rows * length,) in fp32 of `targets` (rows, length); 0 where -100."""
        hidden: Tensor = self.model.transformer(input_ids=inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        together = hidden.shape[0] if torch.is_grad_enabled() else _SCORED_TOGETHER[hidden.device.type]
        losses = []
        for part, wanted in zip(hidden.split(together), targets.flatten().split(together), strict=True):
            logits = self.model.lm_head(part).float()  # (together, vocabulary)
            losses.append(F.cross_entropy(logits, wanted, ignore_index=NOT_SCORED, reduction="none"))
        return torch.cat(losses)


def load_config(name: str, setting: str = "--model") -> GPT2Config:
    """The configuration of a model by name or folder. Raises as `load_model` does."""
    if not os.path.isdir(name):
        hub.offline_if_unreachable()
    with _explained(name, setting):
        found = AutoConfig.from_pretrained(name)
    if not isinstance(found, GPT2Config):
        raise UserError(f"{setting} {name}: is a {found.model_type} model; wikift knows gpt2 models only")
    return found


def load_model(name: str, device: torch.device | str = "cpu", setting: str = "--model") -> GPT2LMHeadModel:
    """A trained GPT-2 in fp32 and eval mode. Raises UserError for a wrong folder, EnvironmentFault without network."""
    loaded = load_config(name, setting)
    with _explained(name, setting):
        model = GPT2LMHeadModel.from_pretrained(name, config=loaded, dtype=torch.float32, attn_implementation="sdpa")
    return model.to(device).eval()  # type: ignore[no-any-return,arg-type]


def build_model(settings: TrainSettings, shape: Shape, eos_token_id: int) -> GPT2LMHeadModel:
    """The model to train, on the CPU in fp32: trained weights, or random ones drawn from the run's seed."""
    if not settings.from_scratch:
        model = load_model(settings.model)
    else:
        words: dict[str, Any] = {**dataclasses.asdict(shape), **parse_overrides(settings.config_overrides or "")}
        torch.manual_seed(seed(settings.seed, "initial weights"))
        model = model_from_config({**words, "bos_token_id": eos_token_id, "eos_token_id": eos_token_id})
    return model


def model_from_config(words: dict[str, Any]) -> GPT2LMHeadModel:
    """A model with random weights, from what `config.to_dict()` gave."""
    made = GPT2Config(**{**words, "architectures": ["GPT2LMHeadModel"], "dtype": "float32"})
    made._attn_implementation = "sdpa"
    return GPT2LMHeadModel(made)


def set_options(model: GPT2LMHeadModel, *, dropout: float | None, gradient_checkpointing: bool) -> None:
    """Set every dropout rate (None leaves the model's own), and trade time for memory."""
    if dropout is not None:
        model.config.resid_pdrop = model.config.embd_pdrop = model.config.attn_pdrop = dropout
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


@contextlib.contextmanager
def _explained(name: str, setting: str) -> Iterator[None]:
    """transformers' long errors about a missing model, in one line with the way out."""
    try:
        yield
    except (OSError, ValueError) as error:
        words = " ".join(str(error).split())[:200]
        if os.path.isdir(name):
            raise UserError(f"{setting} {name}: cannot be loaded ({words}); name a Hugging Face GPT-2 folder") from None
        raise EnvironmentFault(
            f"the model {name} is not in the cache and could not be fetched from the Hub ({words}). "
            "Fetch it where there is a network, or name a folder; nothing was changed."
        ) from None
