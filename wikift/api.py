"""The commands as functions: settings as keywords, results returned, errors raised. For scripts and notebooks.

Every function raises UserError with all problems of its settings, and EnvironmentFault for the machine's (disk,
network). None ends the process where it is the only one of its run; under torchrun a rank that fails ends all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from wikift.base.errors import EnvironmentFault, UserError
from wikift.settings.options import Parsed, parse_all

if TYPE_CHECKING:
    from wikift.evaluation.report import Result

__all__ = [
    "EnvironmentFault",
    "TrainResult",
    "UserError",
    "consolidate",
    "evaluate",
    "generate",
    "plan",
    "prepare",
    "train",
]

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class TrainResult:
    """A run: its folder, and the newest value of each name in its metrics.jsonl (step, loss, eval_loss, ...).

    `interrupted`: SIGTERM, SIGINT, SIGUSR1 or SIGHUP ended it early and all is saved; the same call resumes.
    """

    output_dir: Path
    metrics: dict[str, Any]
    interrupted: bool


def prepare(**settings: Any) -> Path:
    """Text to a token store; returns the store's folder. Settings: `wikift prepare --help`."""
    from wikift.commands.prepare import make
    from wikift.settings.fields import PrepareSettings

    return make(_parsed(PrepareSettings, settings, ()))


def train(**settings: Any) -> TrainResult:
    """Fine-tune a model; the same call resumes an interrupted run. Settings: `wikift train --help`."""
    from wikift.commands import train as command
    from wikift.settings.fields import TrainSettings
    from wikift.watch.record import read_metrics

    parsed = _parsed(TrainSettings, settings, ("dry_run",))
    output_dir, stopped = command.train(parsed)
    metrics: dict[str, Any] = {}
    for values in read_metrics(output_dir / "metrics.jsonl"):
        metrics |= {} if "event" in values else values
    return TrainResult(output_dir, metrics, interrupted=bool(stopped))


def plan(**settings: Any) -> str:
    """What `train` with these settings would be, need and take. Settings: `wikift plan --help`."""
    from wikift.commands import plan as command
    from wikift.settings.fields import PlanSettings

    return command.plan(_parsed(PlanSettings, settings, ("dry_run", "quiet")))[0]


def consolidate(run: str | Path, **settings: Any) -> Path:
    """A run's checkpoint to a Hugging Face directory, which is returned. Settings: `wikift consolidate --help`."""
    from wikift.commands import consolidate as command
    from wikift.settings.run_fields import ConsolidateSettings

    parsed = _parsed(ConsolidateSettings, {"run": run, **settings}, ("quiet",))
    parsed.checked(command.check)  # before any work: a keyword that is not read is an error
    return command.run(parsed.settings)


def evaluate(*models: str | Path, **settings: Any) -> list[Result]:
    """Perplexities, one result a model, split and protocol. Settings: `wikift evaluate --help`."""
    from wikift.commands import evaluate as command
    from wikift.settings.run_fields import EvaluateSettings

    parsed = _parsed(EvaluateSettings, {"models": models, **settings}, ("json", "quiet"))
    parsed.checked(command.check)
    return command.run(parsed.settings)


def generate(model: str | Path, prompts: str | Sequence[str], **settings: Any) -> list[str]:
    """What the model writes behind each prompt, in order, `num_return_sequences` texts each.

    Settings: `wikift generate --help`.
    """
    from wikift.commands import generate as command
    from wikift.settings.run_fields import GenerateSettings

    asked = [prompts] if isinstance(prompts, str) else list(prompts)
    left = ("prompt", "prompts_file", "examples", "json", "train", "quiet")
    parsed = _parsed(GenerateSettings, {"model": model, **settings}, left)
    return [answer.text for answers in command.texts(parsed, asked) for answer in answers]


def _parsed(settings_class: type[Settings], keywords: dict[str, Any], left: Sequence[str]) -> Parsed[Settings]:
    """The keywords as settings. Those in `left` are of the command line: here they would have no effect."""
    parsed = parse_all(settings_class, keywords=keywords)
    if problems := [f"{word}: has no effect in Python; omit it" for word in left if word in keywords]:
        parsed.refuse(problems)
    return parsed
