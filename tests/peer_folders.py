"""Folders that stock DeepSpeed and stock torch DCP write, each by a function for tests/ranks.py."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

CONFIG = {
    "n_layer": 2, "n_head": 2, "n_embd": 30, "vocab_size": 97, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0
}  # fmt: skip


def tiny_model() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    return GPT2LMHeadModel(GPT2Config(**CONFIG))


def save_with_deepspeed(folder: Path, stage: int, precision: str, frozen: bool) -> dict[str, Any]:
    """Two AdamW steps under real DeepSpeed, then save_checkpoint; gives the fp32 masters by name (numpy)"""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    warnings.simplefilter("ignore")
    model = tiny_model()
    model.transformer.wpe.weight.requires_grad = not frozen
    settings = {
        "train_batch_size": torch.distributed.get_world_size(),
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        **({} if precision == "fp32" else {precision: {"enabled": True}}),
    }
    decay = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    rest = [p for p in model.parameters() if p.requires_grad and p.dim() == 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    engine, *_ = deepspeed.initialize(model=model, config=settings, model_parameters=groups, dist_init_required=False)
    for _ in range(2):
        ids = torch.randint(0, 97, (1, 16))
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    engine.save_checkpoint(str(folder))
    masters = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            masters[name] = safe_get_full_fp32_param(parameter).clone().numpy()
        else:
            with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
                masters[name] = parameter.detach().float().clone().numpy()
    return masters


def save_with_dcp(folder: Path, prefix: str, sharded: bool) -> dict[str, Any]:
    """DCP's save of a model (FSDP2 where `sharded`) and its optimizer; gives the whole weights (numpy)."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.fsdp import fully_shard

    warnings.simplefilter("ignore")
    model = tiny_model()
    whole = {name: p.detach().clone().numpy() for name, p in model.named_parameters()}
    if sharded:
        for block in model.transformer.h:
            fully_shard(block)
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    ids = torch.randint(0, 97, (1, 16))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    weights, moments = get_state_dict(model, optimizer)
    content: dict[str, Any] = weights if not prefix else {"optimizer": moments, "step": 1}
    if prefix:
        inner = content
        for word in prefix.split("."):
            inner[word] = {}
            inner = inner[word]
        inner.update(weights)
    dcp.save(content, checkpoint_id=str(folder))
    return whole
