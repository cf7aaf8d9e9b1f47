"""What an answer is asked for with, and how it reaches standard output. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from wikift.settings.fields import GenerateSettings
from wikift.settings.options import flag

if TYPE_CHECKING:
    from wikift.generation.writer import Answer, Writer

# What /set changes and --json reports.
SAMPLING = (
    "max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed", "stop", "num_return_sequences",
    "num_beams",
)  # fmt: skip
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
        "num_return_sequences": (settings.num_return_sequences >= 1, "1 or more"),
        "num_beams": (settings.num_beams >= 1, "1 (no beam search) or more"),
        "batch_size": (settings.batch_size >= 1, "1 or more"),
    }
    problems = [
        f"{flag(name)} {getattr(settings, name):g}: must be {words}"
        for name, (holds, words) in rules.items()
        if not holds
    ]
    if "" in settings.stop:
        problems.append("--stop: is empty, which is everywhere; name a text or leave it out")
    if settings.logprobs and not settings.json:
        problems.append("--logprobs: are written with --json only; add it or leave --logprobs out")
    beams, several = settings.num_beams, settings.num_return_sequences
    if beams > 1:
        if settings.temperature > 0:
            problems.append(f"--num-beams {beams}: draws nothing; add --temperature 0 or leave it out")
        if settings.stop or settings.logprobs or settings.compile:
            others = [flag(name) for name in ("stop", "logprobs", "compile") if getattr(settings, name)]
            problems.append(f"--num-beams {beams}: goes without {' and '.join(others)}; leave one of them out")
        if several > beams:
            problems.append(f"--num-return-sequences {several}: is more than --num-beams {beams}; take as many at most")
    elif several > 1 and settings.temperature == 0:
        problems.append(
            f"--num-return-sequences {several}: at --temperature 0 all would be the same; raise it, or add "
            f"--num-beams {several}"
        )
    return problems


def as_json(answer: Answer, settings: GenerateSettings, model: str) -> str:
    """One answer, with the settings that made it, as one line."""
    sampling = {name: getattr(settings, name) for name in SAMPLING}
    facts = {name: value for name, value in dataclasses.asdict(answer).items() if name != "logprobs" or value}
    return json.dumps({"model": model, **facts, **sampling, "precision": settings.precision}, ensure_ascii=False)


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
) -> list[Answer]:
    """Answer one prompt on standard output: streamed where it is one text, else when it is there."""
    if settings.json or settings.num_return_sequences > 1:
        found = writer.answers([(number, prompt)], settings, note=note, stopped=stopped)
        print_answers(found, settings, model, echo=echo, first=True)
        return found
    found = writer.answers([(number, prompt)], settings, write=_write, note=note, stopped=stopped, echo=echo)
    print(flush=True)
    return found


def print_answers(
    answers: Sequence[Answer], settings: GenerateSettings, model: str, *, echo: bool, first: bool
) -> None:
    """Finished answers on standard output, as lines of JSON or as texts (with `echo` behind their prompt) and a line
    between; the `first` one has none before it."""
    for answer in answers:
        if settings.json:
            print(as_json(answer, settings, model), flush=True)
            continue
        if not first:
            print()
        first = False
        _write((answer.prompt if echo else "") + answer.text)
        print(flush=True)


def speed(answers: Iterable[Answer]) -> str:
    """`12 tokens in 0.6 s, 20 tokens/s` for what was written at once."""
    found = list(answers)
    tokens, seconds = sum(answer.new_tokens for answer in found), max(answer.seconds for answer in found)
    return f"{tokens:,} tokens in {seconds:.1f} s, {tokens / max(seconds, 1e-3):,.1f} tokens/s"


def _write(text: str) -> None:
    print(text.translate(_CONTROLS) if sys.stdout.isatty() else text, end="", flush=True)
