"""What cannot be in a DeepSpeed config file: keys nobody knows, values of another kind, features not honoured."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wikift.settings.deepspeed_keys import (
    ABOVE_ZERO,
    CHOICES,
    HARMLESS,
    KNOWN,
    OWN,
    PASSED,
    REFUSED,
    SCHEDULERS,
    SECTIONS,
    SETTINGS,
    UNUSED,
)
from wikift.settings.options import nearest

Config = dict[str, Any]  # flat: {"zero_optimization.stage": 2, ...}

_NOTHING: tuple[Any, ...] = (False, None, 0, "none", "auto", "", [])  # values that ask for nothing
_KINDS = {bool: "true or false", int: "a whole number, 0 or more", float: "a number", str: "text"}


def file_problems(config: Config, path: str) -> list[str]:
    """Every problem of the file at `path` that does not depend on the command line."""
    where = f" in {path}"
    problems = [
        *_stage_problems(config, where),
        *_offload_problems(config, where),
        *_type_problems(config, where),
        *_precision_problems(config, where),
    ]
    for key, value in config.items():
        section = key.rpartition(".")[0]
        if section == "optimizer.params" and not is_adam(config.get("optimizer.type")):
            continue  # the type is complained of
        if section == "scheduler.params" and schedule_of(config) is None:
            continue
        problems += _value_problems(key, value, where)
    return problems


def stage(config: Config) -> int:
    """The ZeRO stage: 1, 2 or 3; 0 where none is asked for."""
    value = config.get("zero_optimization.stage", 0)
    return int(value) if is_kind(value, int) else 0


def is_kind(value: Any, kind: type) -> bool:
    """Whether a value of JSON is of `kind`: 5e8 is a whole number, true is none."""
    if kind in (bool, str):
        return isinstance(value, kind)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return False
    return kind is float or (value == int(value) and value >= 0)


def is_pair(value: Any) -> bool:
    """Whether it is a list of two numbers."""
    return isinstance(value, list) and len(value) == 2 and all(is_kind(part, float) for part in value)


def is_adam(name: Any) -> bool:
    """Whether DeepSpeed runs the optimizer of this name as AdamW: Adam too, unless adam_w_mode is false."""
    return isinstance(name, str) and name.lower() in ("adam", "adamw")


def schedule_of(config: Config) -> str | None:
    """The --lr-scheduler-type that the file's scheduler is; None where it has none, or one that wikift has not."""
    name = config.get("scheduler.type")
    return SCHEDULERS.get(name) if isinstance(name, str) else None


def show(value: Any) -> str:
    """A value as the file has it, cut where it is long."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _value_problems(key: str, value: Any, where: str) -> Iterator[str]:
    """A key that nobody knows, that asks for something not honoured, or whose value is of another kind."""
    place = f"{key} {show(value)}{where}"
    if key in REFUSED:
        if not (value in (HARMLESS[key], None, "auto") if key in HARMLESS else _asks_nothing(value)):
            yield f"{place}: not honoured; {REFUSED[key]}"
    elif key in PASSED or key in SETTINGS:
        kind = PASSED[key] if key in PASSED else SETTINGS[key][1]
        if value == "auto" or value is None:
            return
        if not is_kind(value, kind):
            yield f'{place}: must be {_KINDS[kind]}, or "auto"'
        elif key in CHOICES and value not in CHOICES[key]:
            yield f"{place}: must be one of {', '.join(CHOICES[key])}{nearest(value, CHOICES[key])}"
        elif key in ABOVE_ZERO and not value:
            yield f'{place}: must be above 0; write "auto" or leave it out'
    elif key not in OWN and key not in UNUSED:
        section, _, name = key.rpartition(".")
        siblings = [k.rpartition(".")[2] for k in (*KNOWN, *SECTIONS) if k.rpartition(".")[0] == section]
        yield f"{key}{where}: no such setting of DeepSpeed's{nearest(name, siblings)}"


def _stage_problems(config: Config, where: str) -> Iterator[str]:
    value = config.get("zero_optimization.stage")
    if value is None:
        yield f"zero_optimization.stage{where}: is missing; write 1, 2 or 3, or leave --deepspeed out (that is DDP)"
    elif value == 0 and value is not False:
        yield f"zero_optimization.stage 0{where}: is no ZeRO; write 1, 2 or 3, or leave --deepspeed out (that is DDP)"
    elif stage(config) not in (1, 2, 3):
        yield f"zero_optimization.stage {show(value)}{where}: must be 1, 2 or 3"


def _offload_problems(config: Config, where: str) -> Iterator[str]:
    for section in ("zero_optimization.offload_optimizer", "zero_optimization.offload_param"):
        device, path = config.get(section + ".device"), config.get(section + ".nvme_path")
        place = f"{section}.device {show(device)}{where}"
        if stage(config) in (1, 2) and (device == "nvme" or (device == "cpu" and section.endswith("param"))):
            yield f"{place}: needs stage 3, the file has {stage(config)}; write 3, or leave the section out"
        elif device == "nvme" and path is None:
            yield f'{place}: needs "nvme_path" beside it, a folder on an NVMe disk'
        elif device == "nvme" and not Path(str(path)).is_dir():
            yield f"{section}.nvme_path {show(path)}{where}: no such folder; name one on an NVMe disk"


def _type_problems(config: Config, where: str) -> Iterator[str]:
    """Optimizers and schedulers that wikift has no counterpart of."""
    sections = {key.partition(".")[0] for key, value in config.items() if value is not None}
    optimizer, scheduler = config.get("optimizer.type"), config.get("scheduler.type")
    if "optimizer" in sections and not is_adam(optimizer):
        yield (
            f"optimizer.type {show(optimizer)}{where}: not honoured, wikift's is AdamW; write AdamW, "
            "or leave the section out"
        )
    if "scheduler" in sections and schedule_of(config) is None:
        instead = "cosine" if scheduler == "WarmupCosineLR" else "linear, cosine or constant"
        yield (
            f"scheduler.type {show(scheduler)}{where}: not honoured, wikift knows {' and '.join(SCHEDULERS)}; "
            f"leave the section out and use --lr-scheduler-type {instead}"
        )
    betas = config.get("optimizer.params.betas", "auto")
    if betas != "auto" and is_adam(optimizer) and not is_pair(betas):
        yield f'optimizer.params.betas {show(betas)}{where}: must be two numbers in brackets, or "auto"'


def _precision_problems(config: Config, where: str) -> Iterator[str]:
    values = {f"{name}.enabled": config.get(f"{name}.enabled") for name in ("bf16", "fp16")}
    for key, value in values.items():
        if not isinstance(value, bool) and value not in ("auto", None):
            yield f'{key} {show(value)}{where}: must be true or false, or "auto"'
    if all(value is True for value in values.values()):
        yield f"{' and '.join(values)}{where}: are both true; leave one on"


def _asks_nothing(value: Any) -> bool:
    if isinstance(value, dict):
        return value.get("enabled") is False or all(_asks_nothing(part) for part in value.values())
    return value in _NOTHING
