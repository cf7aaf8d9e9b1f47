"""A DeepSpeed config file, as Hugging Face's Trainer takes it, read as wikift's settings and completed for DeepSpeed.

A setting of wikift's may be in it: "auto" leaves it to the command line, a number holds where the command line is
silent, and one that contradicts it is an error that names both. Imports neither torch nor deepspeed.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from wikift.base.errors import UserError
from wikift.base.work import Work
from wikift.settings.deepspeed_checks import PASSED, SCHEDULERS, SETTINGS, Config, checked, show, stage, unused
from wikift.settings.fields import TrainSettings
from wikift.settings.options import flag

_ZERO = "zero_optimization."


class Merged(NamedTuple):
    """Settings with what the file says. `taken`: setting -> the key of the file that decided it."""

    settings: TrainSettings
    notes: Sequence[str] = ()
    problems: Sequence[str] = ()
    taken: Mapping[str, str] = {}


def own_files() -> dict[str, Path]:
    """The files that come with wikift, by name: in a wheel inside of the package, in a checkout beside it."""
    package = Path(__file__).resolve().parents[1]
    folders = (package / "ds_configs", package.parent / "ds_configs")
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.json"))}


def read(path: str | Path) -> tuple[Config, list[str]]:
    """The keys of the file, or of wikift's own of that name (zero2), and the problems of their values.

    Raises UserError where it is no object of Hjson, which DeepSpeed reads: JSON with comments and trailing commas.
    """
    import hjson

    try:
        file = Path(path) if Path(path).is_file() else own_files().get(str(path), Path(path))
        content = hjson.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=_without_duplicates)
        if not isinstance(content, dict):
            raise ValueError(f"is a {type(content).__name__}, not an object of settings")
    except (OSError, ValueError, OverflowError, RecursionError) as error:  # 1e999 is a number too large for hjson
        reason = error.strerror if isinstance(error, OSError) else f"not valid JSON: {error}"
        ours = ", ".join(own_files())
        raise UserError(
            f"--deepspeed {path}: cannot be read ({reason}); name a DeepSpeed config file, or one of {ours}"
        ) from None
    return checked(content, str(path))


def merge(settings: TrainSettings, typed: Mapping[str, str]) -> Merged:
    """Read `--deepspeed FILE` into the settings. `typed`: setting -> how it was set, see options.parse.

    Raises nothing: every problem of the file is in the result, to be reported with the others.
    """
    path = settings.deepspeed
    if path is None:
        return Merged(settings)
    if importlib.util.find_spec("deepspeed") is None:
        fix = 'pip install "wikift[deepspeed]", or use --engine fsdp'
        return Merged(settings, problems=[f"--deepspeed {path}: DeepSpeed is not installed; {fix}"])
    try:
        config, problems = read(path)
    except UserError as error:
        return Merged(settings, problems=error.problems)
    if settings.compile and stage(config) == 3:
        problems.append(
            f"--compile: has no effect, stage 3 in {path} gathers weights in hooks that torch.compile does not follow; "
            "remove it, or take stage 2 or --engine fsdp"
        )
    asked = {name: getattr(settings, name) for name in typed if getattr(settings, name) != "auto"}
    taken: dict[str, str] = {}
    values: dict[str, Any] = {}
    for key, name, value in _wishes(config, asked):
        text = f"{key} {show(config[key])} in {path}"
        if name in asked:
            if asked[name] != value:
                problems.append(f'{typed[name]}: contradicts {text}; remove one of the two, or write "auto" there')
        elif name == "max_steps" and "num_train_epochs" in asked:
            epochs = typed["num_train_epochs"]
            problems.append(f'{epochs}: the length of training is set twice, {text} too; write "auto" there')
        elif values.setdefault(name, value) != value:
            first = f"{taken[name]} {show(config[taken[name]])}"
            problems.append(f"{text}: contradicts {first} there; take the same number")
        else:
            taken[name] = key
    merged = dataclasses.replace(settings, **values)
    notes = [f"{Path(path).name}: {note}" for note in _notes(config, merged, taken)]
    return Merged(merged, notes, problems, taken)


def with_keys(problems: Iterable[str], merged: Merged) -> list[str]:
    """`problems` of the merged settings, each with the keys of the file that its settings come from."""
    located = []
    for problem in problems:
        keys = [key for name, key in merged.taken.items() if re.search(flag(name) + r"(?![\w-])", problem)]
        located.append(problem + (f" ({', '.join(keys)} in {merged.settings.deepspeed})" if keys else ""))
    return located


def engine_config(config: Config, work: Work, ranks: int) -> dict[str, Any]:
    """What deepspeed.initialize takes: complete, without "auto", optimizer and scheduler.

    `config` is what `read` returned and `merge` had no problem with; the precision of `work` is resolved.
    """
    hidden_size, precision = work.shape.n_embd, work.precision
    sizes = {"reduce_bucket_size": hidden_size * hidden_size}  # as transformers fills them
    if stage(config) == 3:
        sizes["stage3_prefetch_bucket_size"] = int(0.9 * hidden_size * hidden_size)
        sizes["stage3_param_persistence_threshold"] = 10 * hidden_size
    flat: Config = {
        "communication_data_type": work.reduce_dtype,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # offloading keeps the optimizer that it is given: torch's AdamW
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        "timers.throughput.enabled": False,  # it would wait for the GPU twice in each micro-batch
        # torch.amp.GradScaler's rule, see optim.LossScale
        "fp16": {
            "enabled": precision == "fp16", "loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 2000,
            "hysteresis": 1, "min_loss_scale": 1,
        },
        "bf16.enabled": precision == "bf16",
        _ZERO + "stage": stage(config),
        **{_ZERO + name: size for name, size in sizes.items() if config.get(_ZERO + name) == "auto"},
    }  # fmt: skip
    if precision != "fp32":
        flat["data_types.grad_accum_dtype"] = "fp32"  # micro-batches are added up as under the other engines
    # an "auto" that is left is DeepSpeed's own default, as it is under the Trainer
    flat |= {key: value for key, value in config.items() if key in PASSED and value != "auto"}
    flat |= {
        "train_micro_batch_size_per_gpu": work.micro_batch,
        "gradient_accumulation_steps": work.accumulation,
        "train_batch_size": ranks * work.micro_batch * work.accumulation,
        "gradient_clipping": work.adam.max_grad_norm,
    }
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        functools.reduce(lambda table, section: table.setdefault(section, {}), sections, nested)[name] = value
    return nested


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if twice := [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]:
        raise ValueError(f"{', '.join(twice)} is there twice, which DeepSpeed refuses")
    return dict(pairs)


def _wishes(config: Config, asked: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(key, setting, value) of everything in the file that is a setting of wikift's."""
    for key, setting in SETTINGS.items():
        if config.get(key, "auto") != "auto":
            yield key, setting, config[key]
    if schedule := SCHEDULERS.get(config.get("scheduler.type", "auto")):
        yield "scheduler.type", "lr_scheduler_type", schedule
    # the two switches together: fp32 where bf16 is off, or fp16 off and bf16 not there
    switches = {name: config.get(name + ".enabled") for name in ("bf16", "fp16")}
    off = [name for name, value in switches.items() if value is False]
    if on := [name for name, value in switches.items() if value is True]:
        yield on[0] + ".enabled", "precision", on[0]
    elif asked.get("precision") in off or ("precision" not in asked and off and switches["bf16"] != "auto"):
        yield f"{asked.get('precision', off[0])}.enabled", "precision", "fp32"


def _notes(config: Config, merged: TrainSettings, taken: Mapping[str, str]) -> Iterator[str]:
    """What is printed: what the file decides, what wikift does in its own way, and what it does not use."""
    if taken:
        yield "sets " + ", ".join(f"{flag(name)} {getattr(merged, name)} ({key})" for name, key in taken.items())
    if "optimizer.type" in config:
        yield f"optimizer {config['optimizer.type']} is wikift's AdamW, without decay of biases and LayerNorm"
    if "scheduler.type" in config:
        shape = f"--lr-scheduler-type {merged.lr_scheduler_type} with a linear warm-up"
        yield f"scheduler {config['scheduler.type']} is wikift's {shape}"
    own = [f"{key} {show(config[key])}" for key in PASSED if key.startswith("fp16.") and key in config]
    if own and merged.precision == "fp16":
        yield f"the loss scale follows {', '.join(own)}"
    if names := unused(config):
        yield f"not used by wikift: {', '.join(names)}"
