"""What is wrong with a command's settings, as far as it can be known without torch, the Hub or the text.

Every check reports all the problems that it can find at once.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from wikift.base.command import as_typed
from wikift.base.errors import UserError, nearest
from wikift.base.files import read_lines
from wikift.base.folders import foreign_in, is_hub_name
from wikift.base.model_files import open_model, shape_of
from wikift.base.names import TRACKERS, WIKITEXT
from wikift.base.shape import RELEASED, head_problems, parse_overrides
from wikift.settings.batch_layout import BatchLayout, batch_layout
from wikift.settings.fields import DataSettings, TrainSettings, trackers_of
from wikift.settings.options import flag
from wikift.settings.run_plan import apply_scratch, block_problems
from wikift.settings.values import show


def check_train(settings: TrainSettings, ranks: int, launched: bool) -> list[str]:
    """Every problem of resolved settings that can be known before data is read. `launched`: a launcher set RANK."""
    problems = range_problems(settings) + _schedule_problems(settings)
    batch = (settings.global_batch_size, settings.per_device_train_batch_size, settings.gradient_accumulation_steps)
    layout = None
    if all(number is None or number >= 1 for number in batch):
        try:
            layout = batch_layout(settings, ranks)
        except UserError as error:
            problems += error.problems
    problems += check_data(settings) + _check_model(settings)
    if settings.engine == "single" and ranks > 1:
        problems.append(f"--engine single: uses one process, but the launcher started {ranks}; use --engine ddp")
    if settings.engine == "ddp" and not launched:
        torchrun = as_typed("torchrun --nproc_per_node=N -m wikift train ...")
        problems.append(f"--engine ddp: needs a launcher; start with {torchrun}")
    if not settings.fsdp_reshard and (settings.engine not in ("auto", "fsdp") or settings.deepspeed):
        other = "--deepspeed" if settings.deepspeed else f"--engine {settings.engine}"
        problems.append(f"--no-fsdp-reshard: has no effect under {other}; remove it, or use --engine fsdp")
    problems += _reduction_problems(settings, ranks, layout)
    if settings.residual_dtype != "fp32" and settings.precision != "bf16":
        problems.append(f"--residual-dtype {settings.residual_dtype}: has no effect without --precision bf16; add it")
    if settings.sample_prompts is not None:
        problems += problems_of(lambda: read_lines(Path(str(settings.sample_prompts)), "--sample-prompts"))
    elif settings.sample_steps is not None:
        problems.append(f"--sample-steps {settings.sample_steps}: has no effect without --sample-prompts; name a file")
    problems += tracker_problems("--report-to", trackers_of(settings))
    output = Path(settings.output_dir or ".")
    for path in (output, *output.parents):
        if path.exists() and not path.is_dir():
            problems.append(f"--output-dir {output}: {'is' if path == output else f'{path} is'} a file; name a folder")
    if foreign := foreign_in(output):
        problems.append(f"--output-dir {output}: has {', '.join(foreign)}, not of a wikift run; name a new folder")
    if settings.resume not in ("auto", "never") and not (Path(settings.resume) / "manifest.json").is_file():
        problems.append(f"--resume {settings.resume}: must be auto, never or a checkpoint, RUN/checkpoints/step-...")
    return problems


def tracker_problems(setting: str, names: Sequence[str]) -> list[str]:
    """What is no tracker among `names`, and what is not installed."""
    problems = []
    for name in names:
        # a folder that is called wandb makes a module without origin
        spec = importlib.util.find_spec(name) if name in TRACKERS else None
        if name not in TRACKERS:
            problems.append(f"{setting} {name}: must be {' or '.join(TRACKERS)}; metrics.jsonl is always written")
        elif spec is None or spec.origin is None:
            problems.append(
                f'{setting} {name}: {TRACKERS[name]} is not installed; pip install "wikift[{name}]", or omit it'
            )
    return problems


def _reduction_problems(settings: TrainSettings, ranks: int, layout: BatchLayout | None) -> list[str]:
    asked, problems = f"--reduce-dtype {settings.reduce_dtype}", []
    if settings.reduce_dtype == "fp32":
        return []
    if settings.deepspeed is None and (settings.engine == "single" or (settings.engine == "auto" and ranks == 1)):
        problems.append(f"{asked}: has no effect, --engine {settings.engine} is one process here; remove it")
    if settings.reduce_dtype == "fp16" and settings.precision != "fp16":
        problems.append(f"{asked}: small gradients would underflow without a loss scale; use bf16, or --precision fp16")
    if not settings.fsdp_reshard and layout is not None and layout.accumulation > 1:
        problems.append(  # FSDP2 keeps what waits for the reduction in the reduction's format
            f"{asked}: with --no-fsdp-reshard the {layout.accumulation} micro-batches of a step would be added up in "
            f"{settings.reduce_dtype} too; remove one of the two, or take a larger --per-device-train-batch-size"
        )
    return problems


def problems_of(attempt: Callable[[], object]) -> list[str]:
    """The problems that `attempt` raises, none where it succeeds."""
    try:
        attempt()
    except UserError as error:
        return list(error.problems)
    return []


def check_data(settings: DataSettings) -> list[str]:
    problems = []
    data = getattr(settings, "data", None)
    if data is not None:
        for field in dataclasses.fields(DataSettings):
            value = getattr(settings, field.name)
            if value != field.default:
                typed = f"{flag(field.name)} {show(value)}" if value is not False else flag("no_" + field.name)
                problems.append(
                    f"{typed.removesuffix(' True')}: has no effect, --data {data} is tokenized already; "
                    "remove one of the two"
                )
    if settings.dataset_config is not None and settings.dataset and settings.dataset[0] in (*WIKITEXT, "demo"):
        problems.append(
            f"--dataset-config {settings.dataset_config}: --dataset {settings.dataset[0]} has none; remove it"
        )
    try:
        b"a".decode(settings.encoding or "utf-8", "replace")
    except (LookupError, UnicodeError):
        problems.append(f"--encoding {settings.encoding}: is none that Python knows; try cp1252, gb18030 or utf-16")
    tokenizer = settings.tokenizer or ""
    size = tokenizer.removeprefix("train:")
    if size != tokenizer and (not size.isdecimal() or int(size) < 257):
        problems.append(f"--tokenizer {tokenizer}: SIZE must be 257 tokens or more, the bytes and one; try train:8192")
    return problems


def _plain(value: float) -> str:
    """3.0 -> 3, 1234567 -> 1234567, 1e-05 -> 1e-05."""
    return str(int(value)) if value == int(value) else repr(value)


_RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {  # rule -> (settings, whether a value holds it)
    "1 or more": (
        "block_size global_batch_size per_device_train_batch_size gradient_accumulation_steps max_steps eval_steps "
        "save_steps sample_steps logging_steps hang_timeout profile save_total_limit per_device_eval_batch_size "
        "early_stopping_patience max_eval_samples workers gpus trial context stride max_new_tokens "
        "num_return_sequences batch_size",
        lambda value: value >= 1,
    ),
    "0 or more": ("weight_decay max_grad_norm seed warmup_steps temperature top_k within", lambda value: value >= 0),
    "above 0": ("learning_rate adam_epsilon decay_steps", lambda value: value > 0),
    "above 0 and at most 1": ("data_fraction mfu top_p", lambda value: 0 < value <= 1),
    "above 0 and below 1": ("validation_fraction", lambda value: 0 < value < 1),
    "above 0 and at most a million": ("num_train_epochs", lambda value: 0 < value <= 1e6),
    "at least 0 and below 1": ("adam_beta1 adam_beta2 dropout", lambda value: 0 <= value < 1),
    "from 0.1 to 10; 1 is none": ("repetition_penalty", lambda value: 0.1 <= value <= 10),
    "a whole number, or a fraction below 1": ("warmup_steps decay_steps", lambda value: value < 1 or value % 1 == 0),
}


def range_problems(settings: Any) -> list[str]:
    return [
        f"{flag(name)} {_plain(value)}: must be {rule}"
        for rule, (names, holds) in _RANGES.items()
        for name in names.split()
        if (value := getattr(settings, name, None)) is not None and not holds(value)
    ]


def _schedule_problems(settings: TrainSettings) -> list[str]:
    problems = []
    if settings.max_steps is not None and settings.num_train_epochs is not None:
        problems.append(
            f"--max-steps {settings.max_steps}: the length of training is set twice, --num-train-epochs "
            f"{settings.num_train_epochs:g} too; remove one"
        )
    if settings.on_nonfinite == "rewind" and settings.save_only_model:
        problems.append(
            "--on-nonfinite rewind: resumes a checkpoint, and --save-only-model writes none that can be; omit one"
        )
    if settings.decay_steps is not None and settings.lr_scheduler_type != "warmup_stable_decay":
        problems.append(
            f"--decay-steps {_plain(settings.decay_steps)}: has no effect with --lr-scheduler-type "
            f"{settings.lr_scheduler_type}; use warmup_stable_decay, or remove it"
        )
    if settings.max_steps is not None and settings.warmup_steps >= max(1, settings.max_steps):
        problems.append(
            f"--warmup-steps {_plain(settings.warmup_steps)}: must be less than --max-steps {settings.max_steps}; "
            "use fewer, or a fraction below 1"
        )
    return problems


def _check_model(settings: TrainSettings) -> list[str]:
    overrides, problems = settings.config_overrides, []
    if overrides is not None and not settings.from_scratch:
        problems.append(f"--config-overrides {overrides}: has no effect without --from-scratch; add that or remove it")
    if settings.revision is not None:  # resolved, where it is one of the Hub
        has = "names a revision" if "@" in settings.model else "is a folder"
        problems.append(f"--revision {settings.revision}: has no effect, --model {settings.model} {has}; omit it")
    problems += problems_of(lambda: parse_overrides(overrides or ""))
    if Path(settings.model).exists():
        read: Callable[[str], object] = shape_of if settings.from_scratch else open_model
        problems += problems_of(lambda: read(settings.model))
    if problems:
        return problems
    shape = shape_of(settings.model)
    if shape is None:
        if is_hub_name(settings.model):
            return []
        return [
            f"--model {settings.model}: no such folder, and not one of {', '.join(RELEASED)}"
            f"{nearest(settings.model, RELEASED)}; name one of these, OWNER/NAME of the Hub, or a folder"
        ]
    shape = apply_scratch(settings, shape, None)
    return head_problems(shape, "--config-overrides ") + block_problems(settings, shape)
