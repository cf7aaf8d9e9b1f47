"""One process, no communication: the plain loop that every other engine is tested against."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from wikift.engines.base import OPTIMIZER, SCALARS, STATES, Fragment, FragmentReader
from wikift.model import NextTokenLoss, autocast
from wikift.optim import AdamSettings, LossScale, build_adamw, clip_and_step, total_norm


class SingleEngine:
    """Whole weights, gradients and moments on one device; see Engine for the methods."""

    def __init__(
        self, model: GPT2LMHeadModel, adam: AdamSettings, *, accumulation: int, precision: str, compile: bool
    ) -> None:
        self.model = model.train()
        self.device = next(model.parameters()).device
        self.adam = adam
        self.accumulation = accumulation
        self.precision = precision
        self.optimizer = build_adamw(model.parameters(), adam)
        self.loss_scale = LossScale(precision == "fp16", self.device)
        self.losses: Callable[[Tensor, Tensor], Tensor] = NextTokenLoss(model)
        if compile:
            self.losses = torch.compile(self.losses, dynamic=False)

    def forward_backward(self, blocks: Tensor, *, last: bool) -> Tensor:
        blocks = blocks.to(self.device, non_blocking=True)
        with autocast(self.device, self.precision):
            loss = self.losses(blocks[:, :-1], blocks[:, 1:]).mean()
        (loss * (self.loss_scale.scale / self.accumulation)).backward()
        return loss.detach()

    def step(self, lr: float) -> Tensor:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = total_norm(gradients) / self.loss_scale.scale
        clip_and_step(self.optimizer, norm, lr, self.adam.max_grad_norm, self.loss_scale)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    @torch.no_grad()
    def nll(self, inputs: Tensor, targets: Tensor) -> Tensor:
        training = self.model.training
        self.model.eval()
        try:
            with autocast(self.device, self.precision):
                losses = self.losses(inputs.to(self.device), targets.to(self.device))
            return losses.double().sum()
        finally:
            self.model.train(training)

    def fragments(self) -> Iterator[Fragment]:
        return whole_fragments(self, rank=0, ranks=1)

    def restore(self, reader: FragmentReader) -> None:
        """Copy into the live tensors: their memory, and so the rounding of the kernels, stays as it was."""
        updates, scale, good = (reader.read(OPTIMIZER, name, 0, 1)[0] for name in SCALARS)
        for name, parameter in self.model.named_parameters():
            with torch.no_grad():
                parameter.copy_(reader.read(name, "weight", 0, parameter.numel()).view_as(parameter))
            moments = {
                state: reader.read(name, state, 0, parameter.numel()).view_as(parameter).to(self.device)
                for state in STATES[1:]
            }
            self.optimizer.state[parameter] = {"step": updates.clone().to(self.device), **moments}
        self.loss_scale.scale = scale.to(self.device)
        self.loss_scale.good_steps = good.to(self.device)


def whole_fragments(engine: SingleEngine, rank: int, ranks: int) -> Iterator[Fragment]:
    """Every tensor whole; dealt out over `ranks`, the largest first to the least burdened, so that all ranks write."""
    named = list(engine.model.named_parameters())
    burden = [0] * ranks
    for name, parameter in sorted(named, key=lambda item: (-item[1].numel(), item[0])):
        owner = burden.index(min(burden))
        burden[owner] += parameter.numel()
        if owner != rank:
            continue
        shape = tuple(parameter.shape)
        state = engine.optimizer.state[parameter]
        for kind, tensor in (("weight", parameter), ("exp_avg", state["exp_avg"]), ("exp_avg_sq", state["exp_avg_sq"])):
            yield Fragment(name, kind, 0, shape, tensor.detach().reshape(-1))
    if rank == 0:
        updates = next(iter(engine.optimizer.state.values()))["step"]
        for kind, number in zip(SCALARS, (updates, engine.loss_scale.scale, engine.loss_scale.good_steps), strict=True):
            yield Fragment(OPTIMIZER, kind, 0, (1,), number.detach().float().reshape(1))
