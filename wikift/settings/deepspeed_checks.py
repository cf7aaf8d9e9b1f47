"""The keys of a DeepSpeed config file (DeepSpeed 0.19): which are supported, which refused, and what values they take.

A key is written with dots, "zero_optimization.stage". Any other one is reported as not used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wikift.base.errors import nearest

Config = dict[str, Any]  # flat: {"zero_optimization.stage": 2, ...}

# Passed on to DeepSpeed as they are: section and type of the value, names.
_PASSED: dict[tuple[str, type], str] = {
    ("", bool): "prescale_gradients disable_python_gc zero_allow_untested_optimizer bf16.immediate_grad_update "
    "fp16.consecutive_hysteresis aio.single_submit aio.overlap_events aio.use_gds",
    ("", float): "gradient_predivide_factor fp16.loss_scale",
    ("", str): "data_types.grad_accum_dtype",
    ("fp16.", int): "initial_scale_power loss_scale_window hysteresis min_loss_scale",
    ("aio.", int): "block_size queue_depth intra_op_parallelism",
    ("zero_optimization.", bool): "contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce overlap_comm "
    "allgather_partitions stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential ignore_unused_parameters "
    "round_robin_gradients parameter_alignment memory_efficient_linear override_module_apply log_trace_cache_warnings "
    "enable_sanity_checks",
    ("zero_optimization.", int): "reduce_bucket_size allgather_bucket_size sub_group_size stage3_prefetch_bucket_size "
    "stage3_param_persistence_threshold stage3_model_persistence_threshold stage3_max_live_parameters "
    "stage3_max_reuse_distance stage3_module_granularity_threshold",
    ("zero_optimization.offload_optimizer.", bool): "pin_memory pipeline_read pipeline_write fast_init",
    ("zero_optimization.offload_optimizer.", int): "buffer_count",
    ("zero_optimization.offload_optimizer.", str): "device nvme_path",
    ("zero_optimization.offload_param.", bool): "pin_memory",
    ("zero_optimization.offload_param.", int): "buffer_count buffer_size max_in_cpu",
    ("zero_optimization.offload_param.", str): "device nvme_path",
}
PASSED = {section + name: kind for (section, kind), names in _PASSED.items() for name in names.split()}

# Read as settings of wikift, with the type of their value.
SETTINGS: dict[str, tuple[str, type]] = {
    "train_batch_size": ("global_batch_size", int),
    "train_micro_batch_size_per_gpu": ("per_device_train_batch_size", int),
    "gradient_accumulation_steps": ("gradient_accumulation_steps", int),
    "gradient_clipping": ("max_grad_norm", float),
    "optimizer.params.lr": ("learning_rate", float),
    "optimizer.params.eps": ("adam_epsilon", float),
    "optimizer.params.weight_decay": ("weight_decay", float),
    "scheduler.params.warmup_max_lr": ("learning_rate", float),
    "scheduler.params.warmup_num_steps": ("warmup_steps", float),  # float: below 1 is a fraction of the run
    "scheduler.params.total_num_steps": ("max_steps", int),
    "communication_data_type": ("reduce_dtype", str),
}
SCHEDULERS = {"WarmupLR": "constant", "WarmupDecayLR": "linear"}  # by name, their --lr-scheduler-type

_KINDS = {**PASSED, **{key: kind for key, (_, kind) in SETTINGS.items()}}
_KINDS |= {"fp16.enabled": bool, "bf16.enabled": bool, "optimizer.params.betas": list}
_SUPPORTED = {*_KINDS, "zero_optimization.stage", "optimizer.type", "scheduler.type"}
SECTIONS = {key.rsplit(".", depth)[0] for key in _SUPPORTED for depth in range(1, key.count(".") + 1)}
_CHOICES = {
    **dict.fromkeys(("communication_data_type", "data_types.grad_accum_dtype"), ("fp32", "fp16", "bf16")),
    "zero_optimization.offload_optimizer.device": ("none", "cpu", "nvme"),
    "zero_optimization.offload_param.device": ("none", "cpu", "nvme"),
}
_ABOVE_ZERO = ("zero_optimization.reduce_bucket_size", "fp16.loss_scale_window", "fp16.min_loss_scale")

# Other keys, and whole sections, that change what is learned: refused where they ask for something, by the fix.
_REFUSED_BY_FIX = {
    "use --precision": "amp torch_autocast data_types",
    "it changes what is learned; remove it": "data_efficiency curriculum_learning elasticity progressive_layer_drop "
    "compression_training quantize_training weight_quantization eigenvalue sparse_attention gradient_allreduce_op "
    "zero_optimization.zenflow zero_optimization.zero_quantized_weights zero_optimization.zero_quantized_gradients "
    "zero_optimization.zeropp_loco_param",
    "wikift keeps weights and moments in fp32 beside bf16 and fp16; remove it": "fp16.fp16_master_weights_and_grads "
    "bf16.bf16_master_weights_and_grads bf16.bf16_optimizer_states",
    "wikift's optimizer is AdamW, of lr, betas, eps and weight_decay; remove it": "optimizer.params",
    'write "gradient_clipping" or use --max-grad-norm': "optimizer.params.max_grad_norm",
    "wikift's learning-rate schedule has no such setting; remove it": "scheduler.params",
    'the learning rate rises from 0; write 0 or "auto"': "scheduler.params.warmup_min_lr",
    'the warm-up is a straight line; write "linear" or remove it': "scheduler.params.warmup_type",
    'it is an older spelling; write "bf16"': "bfloat16",
    'it is an older spelling; write "offload_optimizer" or "offload_param"': "zero_optimization.cpu_offload "
    "zero_optimization.cpu_offload_param zero_optimization.cpu_offload_params",
}
_REFUSED = {key: fix for fix, keys in _REFUSED_BY_FIX.items() for key in keys.split()}
# Refused keys with the values that ask for nothing; for all others these are false, 0, "none" and {"enabled": false}.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "gradient_allreduce_op": ("mean",),
    "scheduler.params.warmup_type": ("linear",),
    "scheduler.params.last_batch_iteration": (-1,),
    "optimizer.params.adam_w_mode": (True,),
    "optimizer.params.bias_correction": (True,),
    "optimizer.params.torch_adam": (True, False),
}
_NAMES = {
    bool: "true or false", int: "a whole number, 0 or more", float: "a number", str: "text",
    list: "two numbers in brackets",
}  # fmt: skip


def file_problems(config: Config, path: str) -> list[str]:
    """Every problem of the file at `path` that does not depend on the command line."""
    problems = [f"{key} {show(config.get(key))} in {path}: {rule}" for key, rule in _zero_problems(config)]
    if config.get("bf16.enabled") is True and config.get("fp16.enabled") is True:
        problems.append(f"bf16.enabled and fp16.enabled in {path}: are both true; enable one")
    unknown = {}  # section -> fix
    if str(config.get("optimizer.type")).lower() not in ("adam", "adamw"):  # DeepSpeed runs both as AdamW
        unknown["optimizer"] = "wikift's is AdamW; write AdamW, or remove the section"
    if not schedule_of(config):
        kind = "cosine" if config.get("scheduler.type") == "WarmupCosineLR" else "linear, cosine or constant"
        unknown["scheduler"] = f"wikift knows {' and '.join(SCHEDULERS)}; remove it and use --lr-scheduler-type {kind}"
    for section, fix in unknown.items():
        if any(key.startswith(section + ".") and value is not None for key, value in config.items()):
            problems.append(f"{section}.type {show(config.get(section + '.type'))} in {path}: not supported, {fix}")
    for key, value in config.items():
        skipped = ".params." in key and key.partition(".")[0] in unknown  # the type is reported
        if not skipped and (problem := _value_problem(key, value)):
            problems.append(f"{key} {show(value)} in {path}: {problem}")
    return problems


def unused(config: Config) -> list[str]:
    """The keys that ask for something and have no effect under wikift."""
    return [key for key, value in config.items() if not (key in _SUPPORTED or _fix(key) or _asks_nothing(value))]


def stage(config: Config) -> int:
    """The ZeRO stage: 1, 2 or 3; 0 where none is asked for."""
    value = config.get("zero_optimization.stage", 0)
    return int(value) if is_kind(value, int) else 0


def is_kind(value: Any, kind: type) -> bool:
    """Whether a value of JSON is of `kind`: 5e8 is a whole number, true is none; a list is of two numbers."""
    if kind in (bool, str):
        return isinstance(value, kind)
    if kind is list:
        return isinstance(value, list) and len(value) == 2 and all(is_kind(part, float) for part in value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return False
    return kind is float or (value == int(value) and value >= 0)


def schedule_of(config: Config) -> str | None:
    """The --lr-scheduler-type that the file's scheduler is; None where it has none, or one that wikift has not."""
    return SCHEDULERS.get(str(config.get("scheduler.type")))


def show(value: Any) -> str:
    """A value as the file has it, cut where it is long."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _fix(key: str) -> str | None:
    """What to do instead, of a key that is refused, by itself or with its section."""
    return None if key in _SUPPORTED else _REFUSED.get(key, _REFUSED.get(key.rpartition(".")[0]))


def _value_problem(key: str, value: Any) -> str | None:
    if value == "auto" or value is None:
        return None
    if key in _KINDS and not is_kind(value, _KINDS[key]):
        return f'must be {_NAMES[_KINDS[key]]}, or "auto"'
    if key in _CHOICES and value not in _CHOICES[key]:
        return f"must be one of {', '.join(_CHOICES[key])}{nearest(value, _CHOICES[key])}"
    if key in _ABOVE_ZERO and not value:
        return 'must be above 0; write "auto" or remove it'
    harmless = value in _HARMLESS[key] if key in _HARMLESS else _asks_nothing(value)
    if (fix := _fix(key)) and not harmless:
        return f"not supported; {fix}"
    return None


def _zero_problems(config: Config) -> Iterator[tuple[str, str]]:
    """(key, what is wrong with its value) of the stage and of offloading."""
    if stage(config) not in (1, 2, 3):
        yield "zero_optimization.stage", "must be 1, 2 or 3; write one of them, or remove --deepspeed (that is DDP)"
    for section in ("zero_optimization.offload_optimizer", "zero_optimization.offload_param"):
        device, path = config.get(section + ".device"), config.get(section + ".nvme_path")
        if stage(config) in (1, 2) and (device == "nvme" or (device == "cpu" and section.endswith("param"))):
            yield section + ".device", f"needs stage 3, the file has {stage(config)}; write 3, or remove the section"
        elif device == "nvme" and (path is None or not Path(str(path)).is_dir()):
            yield section + ".nvme_path", "must be an existing folder on an NVMe disk"


def _asks_nothing(value: Any) -> bool:
    if isinstance(value, dict):
        return value.get("enabled") is False or all(_asks_nothing(part) for part in value.values())
    return value in (False, None, 0, "none", "auto", "", [])
