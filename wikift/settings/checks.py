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
from wikift.settings.batch_layout import batch_layout
from wikift.settings.fields import DataSettings, TrainSettings, trackers_of
from wikift.settings.options import flag
from wikift.settings.run_fields import GenerateSettings
from wikift.settings.run_plan import apply_scratch, block_problems
from wikift.settings.schedule import length_problems


def check_train(settings: TrainSettings, ranks: int, launched: bool) -> list[str]:
    """Every problem of resolved settings that can be known before data is read. `launched`: a launcher set RANK."""
    problems = problems_of(lambda: batch_layout(settings, ranks))
    if settings.max_steps is not None:
        unvalidated = dataclasses.replace(settings, early_stopping_patience=None)  # a store may have no validation text
        problems += length_problems(unvalidated, settings.max_steps)
    if settings.on_nonfinite == "rewind" and settings.save_only_model:
        problems.append(
            "--on-nonfinite rewind: resumes a checkpoint, and --save-only-model writes none that can be; omit one"
        )
    problems += check_data(settings) + _check_model(settings)
    if settings.engine == "single" and ranks > 1:
        problems.append(f"--engine single: uses one process, but the launcher started {ranks}; use --engine ddp")
    if settings.engine == "ddp" and not launched:
        torchrun = as_typed("torchrun --nproc_per_node=N -m wikift train ...")
        problems.append(f"--engine ddp: needs a launcher; start with {torchrun}")
    if not settings.fsdp_reshard and settings.engine not in ("auto", "fsdp"):
        problems.append(f"--no-fsdp-reshard: has no effect under --engine {settings.engine}; use fsdp, or remove it")
    problems += _reduction_problems(settings, ranks)
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


def _reduction_problems(settings: TrainSettings, ranks: int) -> list[str]:
    asked, problems = f"--reduce-dtype {settings.reduce_dtype}", []
    if settings.reduce_dtype == "fp32":
        return []
    if settings.deepspeed is None and (settings.engine == "single" or (settings.engine == "auto" and ranks == 1)):
        problems.append(f"{asked}: has no effect, --engine {settings.engine} is one process here; remove it")
    if settings.reduce_dtype == "fp16" and settings.precision != "fp16":
        problems.append(f"{asked}: small gradients would underflow without a loss scale; use bf16, or --precision fp16")
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


def _check_model(settings: TrainSettings) -> list[str]:
    problems = []
    if settings.revision is not None:  # resolved, where it is one of the Hub
        has = "names a revision" if "@" in settings.model else "is a folder"
        problems.append(f"--revision {settings.revision}: has no effect, --model {settings.model} {has}; omit it")
    problems += problems_of(lambda: parse_overrides(settings.config_overrides or ""))
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


# What /set changes and --json reports.
SAMPLING = (
    "max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed", "stop", "num_return_sequences",
)  # fmt: skip


def check_sampling(settings: GenerateSettings) -> list[str]:
    """Every problem of the settings that shape the text."""
    several, greedy = settings.num_return_sequences, settings.temperature == 0
    problems = [
        f"{flag(name)} {getattr(settings, name):g}: has no effect at --temperature 0; remove it (or: /set {name})"
        for name in ("top_k", "top_p", "seed")
        if greedy and getattr(settings, name) is not None
    ]
    if "" in settings.stop:
        problems.append("--stop: is empty, which is everywhere; name a text or remove it")
    if several > 1 and greedy:
        problems.append(
            f"--num-return-sequences {several}: at --temperature 0 all would be the same; raise the temperature"
        )
    return problems


def with_defaults(settings: GenerateSettings) -> Any:
    """`settings` with the defaults that follow from the temperature: at 0 those of `generate(do_sample=False)`."""
    greedy = settings.temperature == 0
    defaults = {"top_k": 0 if greedy else 50, "top_p": 1.0 if greedy else 0.95, "seed": 42}
    defaults["repetition_penalty"] = 1.0 if greedy else 1.1
    missing = {name: value for name, value in defaults.items() if getattr(settings, name) is None}
    return dataclasses.replace(settings, **missing)  # type: ignore[arg-type]
