"""How an answer is asked for and printed: streamed, as text, or as JSON."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from wikift.base.console import printable
from wikift.base.files import json_line
from wikift.settings.checks import SAMPLING, with_defaults
from wikift.settings.run_fields import GenerateSettings

if TYPE_CHECKING:
    from wikift.generation.sampler import Sampling
    from wikift.generation.writer import Answer, Writer


def sampling_of(settings: GenerateSettings) -> Sampling:
    from wikift.generation.sampler import Sampling

    values = with_defaults(settings)
    return Sampling(**{field.name: getattr(values, field.name) for field in dataclasses.fields(Sampling)})


def print_answer(
    writer: Writer,
    prompt: tuple[int, str],
    settings: GenerateSettings,
    source: str,
    say: Callable[[str], None],
    *,
    echo: bool,
    stopped: Callable[[], bool] = lambda: False,
) -> list[Answer]:
    """Answer one prompt (number, text) on standard output: streamed where it is one text, else when it is ready."""
    sampling = sampling_of(settings)
    if settings.json or settings.num_return_sequences > 1:
        answers = writer.answers([prompt], sampling, note=say, stopped=stopped)
        print_answers(answers, settings, source, echo=echo, first=True)
        return answers
    _write(prompt[1] if echo else "")
    answers = writer.answers([prompt], sampling, write=_write, note=say, stopped=stopped)
    print(flush=True)
    return answers


def print_answers(
    answers: Sequence[Answer], settings: GenerateSettings, source: str, *, echo: bool, first: bool
) -> None:
    """Finished answers as lines of JSON, or as texts (with `echo` behind their prompt) with an empty line between."""
    for number, answer in enumerate(answers):
        if settings.json:
            print(as_json(answer, settings, source), flush=True)
        else:
            _write(("" if first and number == 0 else "\n") + (answer.prompt if echo else "") + answer.text)
            print(flush=True)


def as_json(answer: Answer, settings: GenerateSettings, source: str) -> str:
    values = with_defaults(settings)
    sampling = {name: getattr(values, name) for name in SAMPLING}
    return json_line({"model": source, **dataclasses.asdict(answer), **sampling, "precision": settings.precision})


def speed(answers: Iterable[Answer]) -> str:
    """`12 tokens in 0.6 s, 20 tokens/s` for what was written at once."""
    sizes, times = zip(*((answer.new_tokens, answer.seconds) for answer in answers), strict=True)
    return f"{sum(sizes):,} tokens in {max(times):.1f} s, {sum(sizes) / max(*times, 1e-3):,.1f} tokens/s"


def _write(text: str) -> None:
    print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)
