"""A DeepSpeed config file, as Hugging Face's Trainer takes it, read as wikift's settings and completed for DeepSpeed.

The file keeps what only DeepSpeed knows: the stage, offloading, buckets. What is a setting of wikift's too may stand in
it: `"auto"` leaves it to the command line, a number acts where the command line is silent, numbers that agree pass, and
a clash is an error that names both. Imports neither torch nor deepspeed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wikift.config import TrainSettings

Config = dict[str, Any]


@dataclass(frozen=True)
class Merged:
    """Settings with what the file says. `taken`: setting -> the key of the file that decided it."""

    settings: TrainSettings
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    taken: dict[str, str] = field(default_factory=dict)


def read(path: str | Path) -> Config:
    """The file, older spellings brought to today's. Raises UserError where it is none, or has no ZeRO stage 1 to 3."""
    raise NotImplementedError


def stage(config: Config) -> int:
    """The ZeRO stage of a config that `read` gave: 1, 2 or 3."""
    raise NotImplementedError


def merge(settings: TrainSettings, said: Mapping[str, str]) -> Merged:
    """Read `--deepspeed FILE` into the settings. `said`: setting -> how it was given ("--max-steps 5"), see cli.parse.

    Raises nothing: every problem of the file is in the result, to be reported with the others.
    """
    raise NotImplementedError


def engine_config(
    config: Config,
    *,
    micro_batch: int,
    accumulation: int,
    ranks: int,
    precision: str,
    max_grad_norm: float,
    hidden_size: int,
) -> Config:
    """What deepspeed.initialize is given: complete, without "auto", optimizer and scheduler.

    `config` is what `read` gave, `precision` the resolved one (bf16, fp16, fp32).
    """
    raise NotImplementedError
