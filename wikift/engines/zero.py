"""DeepSpeed's ZeRO 1, 2 and 3: optimizer state, gradients and weights split over the ranks as flat ranges.

The only home of `deepspeed`. What it would decide by itself is decided here, so that a run under it is the same run:
the learning rate is set for each step, the optimizer is ours, the loss scale is ours, and its log stays quiet.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from wikift.base.work import Work
from wikift.base.world import World, join_group
from wikift.checkpoint.fragment import MOMENTS, Fragment, FragmentReader
from wikift.engines.optim import LossScale, ScaleRule, build_optimizer
from wikift.engines.single import fragments_of, in_eval, restore_into, scalar_fragments
from wikift.model.gpt2 import DTYPES, NextTokenLoss, check_tied, materialize, parameter_shapes, sum_residual_in


class ZeroEngine:
    """See Engine for the methods.

    `build` returns the model: called on the meta device at stages 1 and 2, which keep whole weights in the precision of
    the matmuls, and under `deepspeed.zero.Init` at stage 3, which keeps this rank's ranges and nothing more.
    """

    def __init__(self, build: Callable[[], GPT2LMHeadModel], work: Work, world: World, *, compile: bool) -> None:
        precision, config = work.precision, work.zero_config
        deepspeed = import_deepspeed(world.local_rank if world.device.index is None else world.device.index)
        self.world, self.stage = world, int(config["zero_optimization"]["stage"])
        dtype = DTYPES[precision]
        config, rule = _with_own_scale(config) if precision == "fp16" else (config, None)
        self.loss_scale = LossScale(rule, torch.device("cpu"), world.size)
        join_group(world)
        with _quiet():
            if precision == "fp16" and world.device.type == "cpu":  # refused, though torch multiplies it there, slowly
                deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
            deepspeed.init_distributed(dist_backend="nccl" if world.device.type == "cuda" else "gloo")
            if self.stage == 3:
                with deepspeed.zero.Init(config_dict_or_path=config):
                    self.model = build()
                check_tied(self.model)
            else:
                with torch.device("meta"):
                    self.model = build()
                materialize(self.model, world.device, dtype)
            if precision != "fp32":
                sum_residual_in(self.model, DTYPES[work.residual_dtype])
            self.model.train()
            self.shapes = parameter_shapes(self.model)
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=NextTokenLoss(self.model, precision, compile=compile),
                optimizer=build_optimizer(self.model.parameters(), work.adam),
                config=config,
            )
        self.adamw: torch.optim.Optimizer = self.optimizer.optimizer
        self._begin_states()

    def forward_backward(self, blocks: Tensor, *, last: bool) -> Tensor:
        blocks = blocks.to(self.world.device, non_blocking=True)
        self.optimizer.loss_scaler.cur_scale = float(self.loss_scale.gain)
        loss: Tensor = self.engine(blocks[:, :-1], blocks[:, 1:]) / blocks[:, 1:].numel()
        self.engine.backward(loss)  # divides by the accumulation and scales
        if not last:
            self.engine.step()  # counts the micro-batch
        return loss.detach()

    def step(self, lr: float) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        norm = torch.tensor(float("inf") if self.optimizer.overflow else float(self.engine.get_global_grad_norm()))
        self.loss_scale.update(torch.isfinite(norm))
        return norm  # on the host: there it is needed, and to copy it to a GPU would be one more wait

    def nll(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return in_eval(self.engine, self.world.device, inputs, targets)

    def next_logits(self, inputs: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        return in_eval(self.engine, self.world.device, inputs, None, mask, positions)

    def fragments(self) -> Iterator[Fragment]:
        for name, parameter in self.model.named_parameters():
            yield from self._owned(name, parameter)
        if self.world.rank == 0:
            yield from scalar_fragments(self.adamw, self.loss_scale)

    def replicas(self) -> Iterable[Tensor]:
        return self.model.parameters() if self.stage < 3 else ()

    def restore(self, reader: FragmentReader) -> None:
        check_tied(self.model)
        restore_into(self.fragments(), reader, self.adamw, self.loss_scale)
        self._refresh_low_precision()

    def _owned(self, name: str, parameter: nn.Parameter) -> Iterator[Fragment]:
        """The live fp32 memory of the range of `parameter` that is this rank's, if there is one."""
        shape = self.shapes[name]
        if self.stage < 3:
            if (mapping := parameter._hp_mapping) is not None:  # type: ignore[attr-defined]
                weight, start = mapping.hp_fragment.detach(), mapping.lp_fragment_address.start
                yield from fragments_of(name, start, shape, weight, mapping.optim_fragment)
            return
        group, offset, padded = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
        start = self.world.rank * padded
        count = min(start + padded, parameter.ds_numel) - start  # type: ignore[attr-defined]
        if count > 0:  # the last ranks' shares of a small tensor are padding alone
            flat = self.optimizer.fp32_partitioned_groups_flat[group]
            moments = {kind: self.adamw.state[flat][kind].narrow(0, offset, count) for kind in MOMENTS}
            yield from fragments_of(name, start, shape, flat.detach().narrow(0, offset, count), moments)

    def _begin_states(self) -> None:
        """Make the optimizer's state exist before its first step, so that it can be saved and restored at any time."""
        flats = (
            self.optimizer.single_partition_of_fp32_groups
            if self.stage < 3
            else self.optimizer.fp32_partitioned_groups_flat
        )
        for flat in flats:
            self.adamw.state[flat] = {state: torch.zeros_like(flat) for state in MOMENTS}
        if self.stage < 3:
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _refresh_low_precision(self) -> None:
        """Make the weights that are computed with from the fp32 masters; collective."""
        with _quiet():
            if self.stage < 3:
                self.optimizer.update_lp_params()
                for group in range(len(self.optimizer.bit16_groups)):
                    self.optimizer._update_model_bit16_weights(group)
                return
            self.optimizer._partition_all_parameters()
            for group in range(len(self.optimizer.fp16_groups)):
                self.optimizer._reassign_or_swap_out_partitioned_parameters(group)
            self.optimizer._post_step(set())


def _with_own_scale(config: dict[str, Any]) -> tuple[dict[str, Any], ScaleRule]:
    """`config` with a constant loss scale in DeepSpeed, which `forward_backward` sets, and the rule that moves it.

    DeepSpeed's own scaler doubles a step later than torch's, and could not resume where another engine stopped.
    """
    asked = config["fp16"]
    fixed = float(asked.get("loss_scale", 0))
    default = ScaleRule()
    rule = ScaleRule(
        initial=fixed or 2.0 ** asked.get("initial_scale_power", 16),
        window=asked.get("loss_scale_window", default.window),
        hysteresis=asked.get("hysteresis", default.hysteresis),
        smallest=asked.get("min_loss_scale", default.smallest),
        dynamic=not fixed,
    )
    return {**config, "fp16": {**asked, "loss_scale": rule.initial}}, rule


def import_deepspeed(local_rank: int = 0) -> Any:
    """DeepSpeed without its noise, and without its own all-reduce through shared memory.

    On a CPU that is an extension compiled at the first use (30 s, and a compiler must be there); gloo does the same.
    """
    os.environ.setdefault("LOCAL_RANK", str(local_rank))  # zero.Init asks for it
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        import deepspeed
    deepspeed.utils.logging.logger.setLevel(logging.ERROR)
    # its own use of functions that torch 2.13 renamed
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # for sums of micro-batches in fp32, bf16 at stage 1 would get an optimizer that shards no gradients and is no ZeRO
    engine: Any = importlib.import_module("deepspeed.runtime.engine")
    engine.DeepSpeedEngine._do_optimizer_sanity_check = lambda *_: engine.ZERO_OPTIMIZATION
    # by name: as an attribute of deepspeed.comm it is hidden by torch itself, which is imported there
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    return deepspeed


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what DeepSpeed prints (not what it raises) out of the terminal."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
