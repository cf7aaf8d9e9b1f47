"""What an answer is asked for with, and how it reaches standard output. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from wikift.cli import flag
from wikift.config import GenerateSettings

if TYPE_CHECKING:
    from wikift.sampling import Answer, Writer

# What /set changes and --json reports.
SAMPLING = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed")
# C0 without tab and newline, delete, C1: a model may make them, and a terminal obeys them
_CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\N{REPLACEMENT CHARACTER}")


def check_sampling(settings: GenerateSettings) -> list[str]:
    """Every problem of the settings that shape the text."""
    rules = {
        "max_new_tokens": (settings.max_new_tokens >= 1, "1 or more"),
        "temperature": (settings.temperature >= 0, "0 or more"),
        "top_k": (settings.top_k >= 0, "0 (all tokens) or more"),
        "top_p": (0 < settings.top_p <= 1, "above 0 and at most 1"),
        "repetition_penalty": (0.1 <= settings.repetition_penalty <= 10, "from 0.1 to 10; 1 is none"),
        "seed": (settings.seed >= 0, "0 or more"),
    }
    return [
        f"{flag(name)} {getattr(settings, name):g}: must be {words}"
        for name, (holds, words) in rules.items()
        if not holds
    ]


def as_json(answer: Answer, settings: GenerateSettings, model: str) -> str:
    """One answer, with the settings that made it, as one line."""
    sampling = {name: getattr(settings, name) for name in SAMPLING}
    return json.dumps({"model": model, **dataclasses.asdict(answer), **sampling}, ensure_ascii=False)


def print_answer(
    writer: Writer,
    prompt: str,
    settings: GenerateSettings,
    number: int,
    model: str,
    note: Callable[[str], None],
    *,
    echo: bool,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Answer on standard output, streamed (with `echo` behind its prompt), or as one line of JSON."""
    if settings.json:
        print(as_json(writer.answer(prompt, settings, number, note=note, stopped=stopped), settings, model), flush=True)
        return
    writer.answer(prompt, settings, number, write=_write, note=note, stopped=stopped, echo=echo)
    print(flush=True)


def _write(text: str) -> None:
    print(text.translate(_CONTROLS) if sys.stdout.isatty() else text, end="", flush=True)
