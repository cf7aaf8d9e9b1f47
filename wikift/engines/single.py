"""One process, no communication: the plain loop that every other engine is tested against."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from wikift.base.work import Work
from wikift.base.world import World
from wikift.checkpoint.fragment import MOMENTS, OPTIMIZER, SCALARS, Fragment, FragmentReader
from wikift.engines.optim import LossScale, ScaleRule, build_optimizer, clip_and_step, total_norm
from wikift.model.gpt2 import DTYPES, NextTokenLoss, materialize, sum_residual_in


class SingleEngine:
    """Whole weights, gradients and moments on one device; see Engine for the methods.

    `model` comes without memory (meta); its values are undefined until `restore`.
    """

    def __init__(self, model: GPT2LMHeadModel, work: Work, world: World, *, compile: bool) -> None:
        self.work, self.device = work, world.device
        materialize(model, self.device)
        self.model = model.train()
        if work.residual_dtype != "fp32":
            sum_residual_in(model, DTYPES[work.residual_dtype])
        self.optimizer = build_optimizer(model.parameters(), work.adam)
        begin_states(self.optimizer)
        self.loss_scale = LossScale(ScaleRule() if work.precision == "fp16" else None, self.device, world.size)
        self.losses: torch.nn.Module = NextTokenLoss(model, work.precision, compile=compile)
        self.thin_embedding_gradient()

    def thin_embedding_gradient(self, wanted: bool = True) -> None:
        """On a CPU, let a tied embedding's gradient be the rows that were read, added to the head's whole one.

        As a whole tensor it would be mostly zeros, written, read and added: 4% of a step (measured).
        """
        tied = self.model.config.tie_word_embeddings and self.device.type == "cpu"
        self.model.transformer.wte.sparse = wanted and tied

    def forward_backward(self, blocks: Tensor, *, last: bool) -> Tensor:
        blocks = blocks.to(self.device, non_blocking=True)
        loss: Tensor = self.losses(blocks[:, :-1], blocks[:, 1:]) / blocks[:, 1:].numel()
        (loss * (self.loss_scale.gain / self.work.accumulation)).backward()
        return loss.detach()

    def step(self, lr: float) -> Tensor:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = total_norm(gradients) / self.loss_scale.gain
        clip_and_step(self.optimizer, norm, lr, self.work.adam.max_grad_norm, self.loss_scale)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def nll(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return in_eval(self.losses, self.device, inputs, targets)

    def next_logits(self, inputs: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        return in_eval(self.losses, self.device, inputs, None, mask, positions)

    def fragments(self) -> Iterator[Fragment]:
        return whole_fragments(self, rank=0, ranks=1)

    def replicas(self) -> Iterable[Tensor]:
        return list(self.model.parameters())

    def restore(self, reader: FragmentReader) -> None:
        restore_into(self.fragments(), reader, self.optimizer, self.loss_scale)


@torch.no_grad()
def in_eval(module: torch.nn.Module, device: torch.device, *arguments: Tensor | None) -> Tensor:
    """`module(*arguments)` on `device`, in eval mode and without gradients; a module in training is again afterwards.

    Never compiled: each length of a split's last window, and of samples, would be compiled again.
    """
    training = module.training
    module.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            result: Tensor = module(*(None if one is None else one.to(device, non_blocking=True) for one in arguments))
        return result
    finally:
        module.train(training)


def whole_fragments(engine: SingleEngine, rank: int, ranks: int) -> Iterator[Fragment]:
    """Every tensor whole; dealt out over `ranks`, the largest first to the least burdened, so that all ranks write."""
    named = list(engine.model.named_parameters())
    burden = [0] * ranks
    for name, parameter in sorted(named, key=lambda item: (-item[1].numel(), item[0])):
        owner = burden.index(min(burden))
        burden[owner] += parameter.numel()
        if owner != rank:
            continue
        yield from fragments_of(name, 0, tuple(parameter.shape), parameter.detach(), engine.optimizer.state[parameter])
    if rank == 0:
        yield from scalar_fragments(engine.optimizer, engine.loss_scale)


def fragments_of(
    name: str, start: int, shape: tuple[int, ...], weight: Tensor, moments: Mapping[str, Tensor]
) -> Iterator[Fragment]:
    """The weights of a parameter from element `start` on and their moments, as live memory."""
    for kind, data in (("weight", weight), *((kind, moments[kind]) for kind in MOMENTS)):
        yield Fragment(name, kind, start, shape, data.view(-1))


def scalar_fragments(optimizer: torch.optim.Optimizer, loss_scale: LossScale) -> Iterator[Fragment]:
    """The numbers of the whole optimizer, for one rank to write."""
    state = next(iter(optimizer.state.values()))
    for kind, number in zip(SCALARS, (state["step"], *loss_scale.numbers()), strict=True):
        yield Fragment(OPTIMIZER, kind, 0, (1,), number.detach().float().reshape(1))


def begin_states(optimizer: torch.optim.Optimizer) -> None:
    """Make the optimizer's state exist before its first step, so that it can be saved and restored at any time."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = {kind: torch.zeros_like(parameter) for kind in MOMENTS}
            optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}


def restore_into(
    fragments: Iterable[Fragment], reader: FragmentReader, optimizer: torch.optim.Optimizer, loss_scale: LossScale
) -> None:
    """Copy into the memory of `fragments`, which stays, and so does the rounding of the kernels; and into the scalars.

    Of the updates made AdamW changes a copy for each parameter.
    """
    updates, *scale = (reader.read(OPTIMIZER, name, 0, 1)[0] for name in SCALARS)
    loss_scale.restore(*scale)
    for state in optimizer.state.values():
        state["step"] = updates.clone().to(state[MOMENTS[0]].device)
    for name, kind, start, _, data in fragments:
        if name != OPTIMIZER:
            data.copy_(reader.read(name, kind, start, start + data.numel()))
