"""GPT-2 from a name, a folder or nothing; its loss; the precision it computes in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel
from transformers.activations import NewGELUActivation

from wikift.base import hub
from wikift.base.errors import UserError, one_line
from wikift.base.model_files import shape_of
from wikift.kernels import attention
from wikift.kernels.dropout import draw_own_masks
from wikift.kernels.loss import fuse_loss, token_losses
from wikift.model.initial_weights import Say, trained_weights

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Precision(NamedTuple):
    """What matmuls are computed in, why, and what the user should know about it (empty mostly)."""

    name: str
    reason: str
    warning: str = ""


def resolve_precision(requested: str, device: torch.device) -> Precision:
    """`auto` is bf16 where the device multiplies it natively, else fp32.

    A processor without AVX512-BF16 or AMX emulates bf16, measured 20 times slower than fp32.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        name = torch.cuda.get_device_name(device)
    else:
        native = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        name = "this processor"
    has = "has" if native else "has no"
    if requested == "tf32":
        if device.type != "cuda" or not native:  # the GPUs that have one have the other
            raise UserError(f"--precision tf32: {name} has no TF32, GPUs from NVIDIA's Ampere on have it; use fp32")
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        return Precision("fp32", "asked for, matmuls rounded to TF32")
    if requested == "auto":
        faster = ""
        if device.type == "cuda" and not native:
            faster = "GPUs with tensor cores multiply fp16 several times faster than fp32: --precision fp16"
        return Precision("bf16" if native else "fp32", f"{name} {has} native bf16 matmul", faster)
    if requested == "bf16" and not native:
        return Precision(
            "bf16", "asked for", f"bf16 is emulated on {name}, up to 20 times slower; --precision auto is fp32"
        )
    if requested == "fp16" and device.type == "cpu":
        return Precision("fp16", "asked for", f"fp16 is slow on {name}; --precision auto is the fast choice")
    return Precision(requested, "asked for")


@contextlib.contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """Matmuls in `precision` (bf16, fp16, fp32), weights and reductions in fp32."""
    with torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32"):
        yield


class NextTokenLoss(nn.Module):
    """A language model and its loss in one module, which every engine wraps.

    The autocast is inside: DeepSpeed switches off one that is around it. `compile` goes block by block: their graphs
    are the same, so that it costs what one costs, and the gathering of sharded weights stays outside of them.
    """

    def __init__(self, model: GPT2LMHeadModel, precision: str = "fp32", *, compile: bool = False) -> None:
        super().__init__()
        self.model, self.precision = model, precision
        fuse_loss(model.lm_head, compile=compile)
        if compile:
            # DDPOptimizer would cut each block's graph in several, which a block's own bucket makes needless
            torch._dynamo.config.optimize_ddp = False
            for block in model.transformer.h:
                block.compile(dynamic=False)
        draw_own_masks(model)
        model.config._attn_implementation = attention.NAME
        # blocks are not padded, and to look at them for a model that has a pad_token_id a GPU would be waited for
        model.transformer.warn_if_padding_and_no_attention_mask = _say_nothing  # type: ignore[method-assign]
        for module in list(model.modules()):
            if isinstance(getattr(module, "act", None), NewGELUActivation):  # the same formula in one pass
                module.act = nn.GELU(approximate="tanh")

    def forward(
        self,
        inputs: Tensor,
        targets: Tensor | None = None,
        mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Summed negative log-likelihood (float64 scalar, nats) of `targets` (rows, length), -100 not scored.

        Without targets the logits (rows, vocabulary) in fp32 that follow on `inputs`, which may be padded on the left:
        `mask` (rows, length) is 0 there, `position_ids` (rows, length) count without it.
        """
        with autocast(inputs.device, self.precision):
            if targets is not None:
                total: Tensor = self.model.lm_head(self._hidden(inputs).flatten(0, 1), targets.flatten())
                return total
            return self.model.lm_head(self._hidden(inputs, mask, position_ids)[:, -1]).float()  # type: ignore[no-any-return]

    @torch.inference_mode()
    def by_token(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """What `forward` sums, (rows * length,) in fp32, 0 where -100, of CPU tensors. Whole weights, no gradients."""
        inputs, targets = inputs.to(self.model.device), targets.to(self.model.device)
        with autocast(inputs.device, self.precision):
            return token_losses(self._hidden(inputs).flatten(0, 1), self.model.lm_head.weight, targets.flatten())

    def _hidden(self, inputs: Tensor, mask: Tensor | None = None, position_ids: Tensor | None = None) -> Tensor:
        if mask is not None:
            mask = attention.causal_mask(mask)
        hidden: Tensor = self.model.transformer(
            input_ids=inputs, attention_mask=mask, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        return hidden


def _say_nothing(input_ids: Tensor, attention_mask: Tensor | None) -> None: ...


def load_config(name: str, setting: str = "--model") -> GPT2Config:
    """The configuration of a model by name or folder. Raises as `load_model` does."""
    folder = hub.fetch(name, setting, hub.CONFIG)
    shape_of(name, setting, fetched=True)  # raises where it is none of GPT-2
    try:
        config = GPT2Config.from_pretrained(folder)
    except Exception as error:  # transformers and its dataclasses raise nearly everything
        raise UserError(f"{setting} {name}: config.json cannot be used ({one_line(error)}); fix it") from None
    return config


def load_generation_config(name: str, config: GPT2Config) -> GenerationConfig:
    """The generation configuration that a model by name or folder comes with, or what follows from its own."""
    folder = hub.fetch(name, "--model", hub.CONFIG)
    if not (folder / hub.CONFIG[1]).exists():
        return GenerationConfig.from_model_config(config)
    try:
        return GenerationConfig.from_pretrained(folder)
    except Exception as error:
        raise UserError(f"--model {name}: {hub.CONFIG[1]} cannot be used ({one_line(error)}); fix it") from None


def load_model(
    name: str, device: torch.device | str = "cpu", setting: str = "--model", say: Say = lambda line: None
) -> GPT2LMHeadModel:
    """A trained GPT-2 in fp32 and eval mode; its `config.dtype` is that of the stored weights.

    Raises UserError for a wrong folder, EnvironmentFault without network.
    """
    config, read = trained_weights(name, load_config(name, setting), setting, say)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = make_model(config)
    materialize(model, torch.device(device))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(read(key, 0, parameter.numel()).view_as(parameter))
    return model.eval()  # type: ignore[no-any-return]


def model_config(values: dict[str, Any]) -> GPT2Config:
    """The configuration of a model to train, from what `config.to_dict()` returned, or a part of it."""
    config = GPT2Config(**{**values, "architectures": ["GPT2LMHeadModel"], "dtype": "float32"})
    config._attn_implementation = "sdpa"
    return config


def make_model(config: GPT2Config, *, gradient_checkpointing: bool = False) -> GPT2LMHeadModel:
    """The modules. On the meta device they have no memory: engines make room for what a rank keeps, and no more."""
    model = GPT2LMHeadModel(config)
    if gradient_checkpointing:
        # the old name warns in transformers 5.23, older ones know no other
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model


def materialize(model: GPT2LMHeadModel, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
    """Give a meta model memory, sharded tensors their shard's; what is in it is left open. The head stays tied."""
    if dtype != torch.float32:
        nn.Module.to(model, dtype)
    assert not list(model.buffers()), "a buffer would lose its content"
    model.to_empty(device=device)
    model.tie_weights()
    check_tied(model)


def check_tied(model: GPT2LMHeadModel) -> None:
    """The head and the embedding are one tensor where the configuration says so: a silent copy would train apart."""
    if model.config.tie_word_embeddings:
        assert model.lm_head.weight is model.transformer.wte.weight, "the tied head is no longer tied"


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Every parameter's whole shape by Hugging Face name, the tied head once; under ZeRO-3 too."""
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}


def shapes_of(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """`parameter_shapes` of a model that is not there yet."""
    with torch.device("meta"):
        return parameter_shapes(make_model(config))


def sum_residual_in(model: GPT2LMHeadModel, dtype: torch.dtype) -> None:
    """Sum the residual in `dtype`, and normalise what is in it, whatever the weights are held in.

    In fp32, as autocast does with fp32 weights: sharded engines gather weights in the matmuls' precision. Without this
    the residual would be rounded to 8 bits in each block, and bf16 under FSDP2 or ZeRO be another experiment than bf16
    under DDP. In bf16 that is asked for, of every engine: each block's pass over it reads and writes half the bytes.
    """
    model.transformer.drop.register_forward_pre_hook(lambda module, inputs: tuple(t.to(dtype) for t in inputs))
    for module in model.modules():
        if type(module) is nn.LayerNorm:
            module.__class__ = _LayerNormOfResidual  # not its `forward`: see dropout.draw_own_masks


class _LayerNormOfResidual(nn.LayerNorm):
    """In its input's type, where autocast would convert it to fp32; its sums are in fp32 in any case."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
        with torch.autocast(input.device.type, enabled=False):
            return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)
