"""launch/generate.py: prompts to text, streamed as it is made.

Where prompts come from is `prompts`, the interactive loop is `session`, one answer is `sampling`; a run without a model
is trained first (`first_training`). All that can be wrong with a command line is said before torch loads.
"""

from __future__ import annotations

import dataclasses
import io
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wikift.base import folders
from wikift.base.errors import UserError
from wikift.base.files import read_lines
from wikift.commands.main import EXIT_DONE
from wikift.export.export import model_source
from wikift.generation import prompts
from wikift.generation.answers import check_sampling, print_answer, print_answers, speed
from wikift.settings.fields import GenerateSettings
from wikift.settings.options import parse
from wikift.settings.run_plan import ranks_started

if TYPE_CHECKING:
    from wikift.generation.writer import Answer, Writer

DESCRIPTION = "Let a trained model go on from a prompt. Without a prompt it is interactive."
EPILOG = """examples:
  python launch/generate.py                              the newest run, interactive
  python launch/generate.py runs/NAME --prompt "The Renaissance was"
  python launch/generate.py runs/NAME --examples --json --seed 7
  python launch/generate.py runs/NAME --prompts-file FILE --batch-size 32 --stop "\\n" --json
  python launch/generate.py runs/NAME -- --dataset demo --from-scratch
                     where runs/NAME has no model yet: what follows -- goes to launch/train.py"""


def main(argv: Sequence[str]) -> int:
    """Run the command; gives its exit code."""
    words, training = _split(argv)
    settings = parse(GenerateSettings, words, prog="launch/generate.py", description=DESCRIPTION, epilog=EPILOG)
    settings = dataclasses.replace(settings, stop=tuple(map(prompts.escapes, settings.stop)))
    asked = _check(settings, training)
    for stream in (sys.stdin, sys.stdout):
        if isinstance(
            stream, io.TextIOWrapper
        ):  # what a terminal cannot show, or a pipe cannot mean, is no reason to end
            stream.reconfigure(errors="replace")
    name = settings.model
    if name is None and (newest := folders.newest_run()) is not None:
        name = str(newest)
    if name is None or not folders.has_model(name):
        from wikift.commands.first_training import train_first

        code, name = train_first(name, training or [], allowed=settings.train, quiet=settings.quiet)
        if code != EXIT_DONE:
            return code
    elif training and not settings.quiet:
        print(f"wikift: {name} has a model, so nothing is trained and what follows -- is not used", file=sys.stderr)
    return _answer_all(settings, name, asked)


def _split(argv: Sequence[str]) -> tuple[list[str], list[str] | None]:
    """This command's arguments, and those behind a lone `--` (None without one)."""
    words = list(argv)
    if "--" not in words:
        return words, None
    place = words.index("--")
    return words[:place], words[place + 1 :]


def _check(settings: GenerateSettings, training: list[str] | None) -> list[str] | None:
    """The prompts asked for, None for an interactive session. Raises UserError with all that is wrong."""
    problems = check_sampling(settings)
    given = {
        "--prompt": settings.prompt is not None,
        "--prompts-file": settings.prompts_file is not None,
        "--examples": settings.examples,
    }
    chosen = [name for name, there in given.items() if there]
    if len(chosen) > 1:
        problems.append(f"{' and '.join(chosen)}: each says what to answer; leave all but one out")
    if ranks_started() > 1:
        problems.append(f"torchrun: started {ranks_started()} processes, this is work for one; start it with python")
    if training is not None and not settings.train:
        problems.append("--no-train: what follows -- is for a training; leave one of the two out")
    asked: list[str] | None = None
    try:
        if settings.prompts_file is not None:
            asked = read_lines(Path(settings.prompts_file), "--prompts-file")
    except UserError as error:
        problems += error.problems
    if problems:
        raise UserError(*problems)
    if settings.prompt is not None:
        asked = [prompts.clean(settings.prompt)]
    return list(prompts.EXAMPLES) if settings.examples else asked


def _answer_all(settings: GenerateSettings, name: str, asked: list[str] | None) -> int:
    def say(text: str) -> None:
        if not settings.quiet:
            print(f"wikift: {text}", file=sys.stderr, flush=True)

    source = model_source(name, say)
    from wikift.generation.writer import load_writer

    writer = load_writer(source, settings.device, settings.precision, settings.compile, say)
    if writer.warning:
        say(writer.warning)
    say(f"{source}, {writer.parameters:,} parameters on {writer.device}")
    if asked is None:
        from wikift.commands.session import converse

        return converse(writer, settings, source, say)
    if len(asked) == 1:
        say(speed(print_answer(writer, asked[0], settings, 0, source, say, echo=not settings.quiet)))
        return EXIT_DONE
    _answer_batches(writer, asked, settings, source, say)
    return EXIT_DONE


def _answer_batches(
    writer: Writer, asked: list[str], settings: GenerateSettings, source: str, say: Callable[[str], None]
) -> None:
    """Batches of prompts of like length, the shortest first; an answer is printed when all before it are."""
    started = time.perf_counter()
    # characters tell the length well enough, and an order made of tokens would encode every prompt twice
    order = sorted(range(len(asked)), key=lambda number: len(asked[number]))
    together = max(1, settings.batch_size // settings.num_return_sequences)
    ready: dict[int, list[Answer]] = {}
    printed = tokens = 0
    for batch in (order[place : place + together] for place in range(0, len(order), together)):
        notes: list[str] = []
        found = writer.answers([(number, asked[number]) for number in batch], settings, note=notes.append)
        for text in dict.fromkeys(notes):
            say(text)
        several = settings.num_return_sequences
        ready.update({number: found[k * several : (k + 1) * several] for k, number in enumerate(batch)})
        tokens += sum(answer.new_tokens for answer in found)
        while printed in ready:
            print_answers(ready.pop(printed), settings, source, echo=not settings.quiet, first=printed == 0)
            printed += 1
    seconds = time.perf_counter() - started
    say(f"{len(asked):,} prompts, {tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:,.1f} tokens/s")
