"""torch's FSDP2 (fully_shard): each rank keeps its rows of every weight, gradient and moment.

A block's weights are gathered when it is needed, in the precision of the matmuls; gradients are averaged in
`reduce_dtype`, fp32 by default.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import GPT2LMHeadModel

from wikift.base.work import Work
from wikift.base.world import World, join_group
from wikift.checkpoint.fragment import Fragment, FragmentReader
from wikift.engines.optim import LossScale, ScaleRule, build_optimizer, clip_and_step, total_norm
from wikift.engines.single import begin_states, fragments_of, in_eval, restore_into, scalar_fragments
from wikift.model.gpt2 import DTYPES, NextTokenLoss, check_tied, materialize, sum_residual_in


class FSDPEngine:
    """See Engine for the methods. `model` comes without memory (meta) and gets its shard's only.

    With `fsdp_reshard` a block's weights are freed after its forward and gathered for its backward, and no gradient
    stays whole between micro-batches (the memory of ZeRO-3). Without it weights and gradients stay whole within a step,
    and only the last micro-batch communicates (ZeRO-2's memory, less traffic).
    """

    def __init__(self, model: GPT2LMHeadModel, work: Work, world: World, *, compile: bool) -> None:
        self.world, self.work, self.reshard, precision = world, work, work.fsdp_reshard, work.precision
        self.model = model.train()
        low = DTYPES[precision] if precision != "fp32" else None
        if low is not None:
            sum_residual_in(model, DTYPES[work.residual_dtype])
        join_group(world)
        mesh = init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("ranks",))
        reduce_dtype = DTYPES[work.reduce_dtype]
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
        self.losses = NextTokenLoss(model, precision, compile=compile)
        *blocks, last = model.transformer.h
        # the last block is needed again at once, and so is what is in none
        *sharded, root = (
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=self.reshard and module in blocks)
            for module in (*blocks, last, self.losses)
        )
        for module, following in pairwise([root, *sharded]):  # gathers before the host launches the computation
            module.set_modules_to_forward_prefetch([following])
        materialize(model, world.device)
        self.loss_scale = LossScale(ScaleRule() if precision == "fp16" else None, world.device, world.size)
        # The optimizer works on the shards as plain tensors sharing their memory: torch's fused kernel takes no DTensor
        self.local = {name: nn.Parameter(_shard(p)) for name, p in model.named_parameters() if _shard(p).numel()}
        decay = {name: p.dim() for name, p in model.named_parameters()}
        assert all(decay[name] == p.dim() for name, p in self.local.items()), "shards keep their dimensions"
        self.optimizer = build_optimizer(self.local.values(), work.adam)
        begin_states(self.optimizer)

    def forward_backward(self, blocks: Tensor, *, last: bool) -> Tensor:
        blocks = blocks.to(self.world.device, non_blocking=True)
        assert isinstance(self.losses, FSDPModule)
        self.losses.set_requires_gradient_sync(last or self.reshard)
        self.losses.set_reshard_after_backward(last or self.reshard)
        loss: Tensor = self.losses(blocks[:, :-1], blocks[:, 1:]) / blocks[:, 1:].numel()
        (loss * (self.loss_scale.gain / self.work.accumulation)).backward()
        return loss.detach()

    def step(self, lr: float) -> Tensor:
        for name, parameter in self.model.named_parameters():
            if name in self.local:
                self.local[name].data = _shard(parameter)  # FSDP2 may have moved it
                gradient = parameter.grad
                assert isinstance(gradient, DTensor)
                self.local[name].grad = gradient.to_local()
        squared = total_norm([p.grad for p in self.local.values() if p.grad is not None]).square()
        norm = self.world.total(squared).sqrt() / self.loss_scale.gain
        clip_and_step(self.optimizer, norm, lr, self.work.adam.max_grad_norm, self.loss_scale)
        self.optimizer.zero_grad(set_to_none=True)
        self.model.zero_grad(set_to_none=True)
        return norm

    def nll(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self._in_eval(inputs, targets)

    def next_logits(self, inputs: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        return self._in_eval(inputs, None, mask, positions)

    def _in_eval(self, *arguments: Tensor | None) -> Tensor:
        result = in_eval(self.losses, self.world.device, *arguments)
        self._reshard()  # without a backward nothing else frees the weights, nor gathers new ones
        return result

    def _reshard(self) -> None:
        for module in self.losses.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def fragments(self) -> Iterator[Fragment]:
        self._reshard()  # after a step that was stopped midway
        for name, parameter in self.model.named_parameters():
            if name in self.local:
                state, shape = self.optimizer.state[self.local[name]], tuple(parameter.shape)
                yield from fragments_of(name, _start(parameter), shape, _shard(parameter), state)
        if self.world.rank == 0:
            yield from scalar_fragments(self.optimizer, self.loss_scale)

    def replicas(self) -> Iterable[Tensor]:
        return ()

    def restore(self, reader: FragmentReader) -> None:
        check_tied(self.model)
        restore_into(self.fragments(), reader, self.optimizer, self.loss_scale)


def _shard(parameter: Tensor) -> Tensor:
    """This rank's rows, sharing their memory."""
    assert isinstance(parameter, DTensor)
    return parameter.to_local().detach()


def _start(parameter: Tensor) -> int:
    """Where this rank's rows begin in the flattened whole."""
    assert isinstance(parameter, DTensor)
    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    row = parameter.numel() // max(1, parameter.shape[0])
    return int(offset[0]) * row
