"""The keys of a DeepSpeed config file (DeepSpeed 0.19): ours, passed on, or refused; any other one only tunes or logs.

A key is written with dots, "zero_optimization.stage". Values are read as DeepSpeed's fields read them: "2" is a number.
"""

from __future__ import annotations

import contextlib
import json
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from wikift.settings.fields import TrainSettings
from wikift.settings.values import convert, kind_of

Config = dict[str, Any]  # flat: {"zero_optimization.stage": 2, ...}

_ZERO = "zero_optimization."
# Passed on to DeepSpeed: section and kind of the value, names.
_PASSED: dict[tuple[str, type], str] = {
    ("", bool): "prescale_gradients disable_python_gc zero_allow_untested_optimizer bf16.immediate_grad_update "
    "fp16.consecutive_hysteresis aio.single_submit aio.overlap_events aio.use_gds",
    ("", int): "fp16.initial_scale_power fp16.loss_scale_window fp16.hysteresis fp16.min_loss_scale aio.block_size "
    "aio.queue_depth aio.intra_op_parallelism",
    ("", float): "gradient_predivide_factor fp16.loss_scale",
    ("", str): "data_types.grad_accum_dtype",
    (_ZERO, bool): "contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce overlap_comm "
    "allgather_partitions stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential ignore_unused_parameters "
    "round_robin_gradients parameter_alignment memory_efficient_linear override_module_apply log_trace_cache_warnings "
    "enable_sanity_checks offload_param.pin_memory offload_optimizer.pin_memory offload_optimizer.pipeline_read "
    "offload_optimizer.pipeline_write offload_optimizer.fast_init",
    (_ZERO, int): "reduce_bucket_size allgather_bucket_size sub_group_size stage3_prefetch_bucket_size "
    "stage3_param_persistence_threshold stage3_model_persistence_threshold stage3_max_live_parameters "
    "stage3_max_reuse_distance stage3_module_granularity_threshold offload_optimizer.buffer_count "
    "offload_param.buffer_count offload_param.buffer_size offload_param.max_in_cpu",
    (_ZERO, str): "offload_optimizer.device offload_optimizer.nvme_path offload_param.device offload_param.nvme_path",
}
PASSED = {section + name: kind for (section, kind), names in _PASSED.items() for name in names.split()}
_RULES = dict.fromkeys((_ZERO + "reduce_bucket_size", "fp16.loss_scale_window", "fp16.min_loss_scale"), ">=1")
_CHOICES = {"grad_accum_dtype": ("fp32", "fp16", "bf16"), "device": ("none", "cpu", "nvme")}  # by the key's end
_SWITCH = {**dict.fromkeys(("true", "1", "yes", "on"), True), **dict.fromkeys(("false", "0", "no", "off"), False)}
# Read as settings of wikift.
SETTINGS = {
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.betas.0": "adam_beta1",
    "optimizer.params.betas.1": "adam_beta2",
    "optimizer.params.eps": "adam_epsilon",
    "optimizer.params.weight_decay": "weight_decay",
    "scheduler.params.warmup_max_lr": "learning_rate",
    "scheduler.params.warmup_num_steps": "warmup_steps",
    "scheduler.params.total_num_steps": "max_steps",
    "communication_data_type": "reduce_dtype",
}
_KERNELS = ("torch_adam", "fused", "foreach")  # which compute the same AdamW
_HINTS = {name: kind_of(hint) for name, hint in typing.get_type_hints(TrainSettings).items()}
SCHEDULERS = {"WarmupLR": "constant", "WarmupDecayLR": "linear"}  # by name, their --lr-scheduler-type
# key: kind of its value, and what `convert` is to know of it
_KINDS: dict[str, tuple[Any, Mapping[str, Any]]] = {
    **{
        key: (kind, {"choices": _CHOICES.get(key.split(".")[-1]), "prose": True, "rule": _RULES.get(key, ">=0")})
        for key, kind in PASSED.items()
    },
    **{key: (_HINTS[name], TrainSettings.__dataclass_fields__[name].metadata) for key, name in SETTINGS.items()},
    **dict.fromkeys(("fp16.enabled", "bf16.enabled"), (bool, {})),
    "optimizer.type": (str, {"choices": ("Adam", "AdamW"), "prose": True}),  # DeepSpeed runs both as AdamW
    "scheduler.type": (str, {"choices": tuple(SCHEDULERS), "prose": True}),
    **dict.fromkeys((_ZERO + "stage", *(f"optimizer.params.{name}" for name in _KERNELS)), (None, {})),
}
_SECTIONS = {key.rsplit(".", depth)[0] for key in _KINDS for depth in range(1, key.count(".") + 1)}
_ALIASES = {key.replace("stage3_", ""): key for key in PASSED} | {  # names that DeepSpeed takes for the same
    "bfloat16": "bf16",
    _ZERO + "cpu_offload": _ZERO + "offload_optimizer.device",
    _ZERO + "cpu_offload_param": _ZERO + "offload_param.device",
}
# Keys, and whole sections, that change what is learned: refused where they ask for something, by the fix.
_REFUSED_BY_FIX = {
    "remove it and use --precision": "amp torch_autocast data_types",
    'remove it; "gradient_clipping" or --max-grad-norm clips': "optimizer.params.max_grad_norm",
    'write two numbers in brackets, or "auto"': "optimizer.params.betas",
    'the learning rate rises from 0; write 0 or "auto"': "scheduler.params.warmup_min_lr",
    "it changes what is learned, and wikift has no such setting; remove it": "optimizer.params scheduler.params "
    "data_efficiency curriculum_learning elasticity progressive_layer_drop compression_training "
    "quantize_training weight_quantization eigenvalue sparse_attention gradient_allreduce_op zero_optimization.zenflow "
    "zero_optimization.zero_quantized_weights zero_optimization.zero_quantized_gradients "
    "zero_optimization.zeropp_loco_param fp16.fp16_master_weights_and_grads bf16.bf16_master_weights_and_grads "
    "bf16.bf16_optimizer_states",
}
_REFUSED = {key: fix for fix, keys in _REFUSED_BY_FIX.items() for key in keys.split()}
_HARMLESS = {  # values that ask for nothing, beside false, 0, "none", "auto" and {"enabled": false}
    "gradient_allreduce_op": "mean",
    "scheduler.params.warmup_type": "linear",
    "scheduler.params.last_batch_iteration": -1,
    **dict.fromkeys(("optimizer.params.adam_w_mode", "optimizer.params.bias_correction"), True),
}


def checked(content: Mapping[str, Any], path: str) -> tuple[Config, list[str]]:
    """The keys of the file, flat, and every problem that does not depend on the command line.

    A key with null, or with a problem, is not among the keys.
    """
    config: Config = {}
    problems = []
    for key, value in _flat(content):
        try:
            if key in config:
                raise ValueError("is there twice, under two of its names; remove one")
            config[key] = _converted(key, value)
        except ValueError as error:
            problems.append(f"{key} {show(value)} in {path}: {error}")
    problems += [f"{key} {show(config.get(key))} in {path}: {rule}" for key, rule in _zero_problems(config)]
    if config.get("bf16.enabled") is True and config.get("fp16.enabled") is True:
        problems.append(f"bf16.enabled and fp16.enabled in {path}: are both true; enable one")
    return config, problems


def unused(config: Config) -> list[str]:
    """The keys that ask for something and have no effect under wikift."""
    return [key for key, value in config.items() if not (key in _KINDS or _fix(key) or _asks_nothing(value))]


def stage(config: Config) -> int:
    """The ZeRO stage: 1, 2 or 3; 0 where the file has none."""
    with contextlib.suppress(ValueError):
        return int(convert(config.get(_ZERO + "stage", 0), int, {}, "line"))
    return 0


def show(value: Any) -> str:
    """A value as the file has it, cut where it is long."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything but null."""
    for name, value in table.items():
        key = _ALIASES.get(prefix + name, prefix + name)
        if name == "betas" and isinstance(value, list) and len(value) == 2:
            value = dict(zip("01", value, strict=True))
        if name in ("cpu_offload", "cpu_offload_param") and isinstance(value, bool):
            value = "cpu" if value else "none"
        if isinstance(value, dict) and key in _SECTIONS:
            yield from _flat(value, key + ".")
        elif value is not None:
            yield key, value


def _converted(key: str, value: Any) -> Any:
    """`value` as DeepSpeed takes it for `key`. Raises ValueError with the rule that it breaks."""
    if key in _SECTIONS and key != "optimizer.params.betas":
        raise ValueError("must be a section in braces")
    harmless = value in (_HARMLESS[key], "auto") if key in _HARMLESS else _asks_nothing(value)
    if (fix := _fix(key)) and not harmless:
        raise ValueError(f"not supported; {fix}")
    kind, meta = _KINDS.get(key, (None, {}))
    if kind is None or value == "auto":
        return value
    if kind is bool:
        value = _SWITCH.get(str(value).lower(), value)
    if key == "optimizer.type":
        value = {"adam": "Adam", "adamw": "AdamW"}.get(str(value).lower(), value)
    try:
        return convert(value, kind, meta, "line")
    except ValueError as error:
        own = " with --lr-scheduler-type" if key == "scheduler.type" else ""
        raise ValueError(f'{error}, or "auto"{own}') from None


def _fix(key: str) -> str | None:
    """What to do instead, of a key that is refused, by itself or with its section."""
    return None if key in _KINDS else _REFUSED.get(key, _REFUSED.get(key.rpartition(".")[0]))


def _zero_problems(config: Config) -> Iterator[tuple[str, str]]:
    """(key, what is wrong with its value) of the stage and of offloading."""
    if stage(config) not in (1, 2, 3):
        yield _ZERO + "stage", "must be 1, 2 or 3; write one of them, or remove --deepspeed (that is DDP)"
    for section in (_ZERO + "offload_optimizer", _ZERO + "offload_param"):
        device, folder = config.get(section + ".device"), config.get(section + ".nvme_path")
        if stage(config) in (1, 2) and (device == "nvme" or (device == "cpu" and section.endswith("param"))):
            yield section + ".device", f"needs stage 3, the file has {stage(config)}; write 3, or remove the section"
        elif device == "nvme" and (folder is None or not Path(str(folder)).is_dir()):
            yield section + ".nvme_path", "must be an existing folder on an NVMe disk"


def _asks_nothing(value: Any) -> bool:
    if isinstance(value, dict):
        return value.get("enabled") is False or all(_asks_nothing(part) for part in value.values())
    return value in (False, None, 0, "none", "auto", "", [])
