"""What can be wrong with the settings of the generate command, and the defaults that follow from others."""

from __future__ import annotations

import dataclasses
from typing import Any

from wikift.settings.checks import range_problems
from wikift.settings.fields import GenerateSettings
from wikift.settings.options import flag

# What /set changes and --json reports.
SAMPLING = (
    "max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed", "stop", "num_return_sequences",
)  # fmt: skip


def check_sampling(settings: GenerateSettings) -> list[str]:
    """Every problem of the settings that shape the text."""
    several, greedy = settings.num_return_sequences, settings.temperature == 0
    problems = range_problems(settings)
    problems += [
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
