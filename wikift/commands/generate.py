"""The generate command: prompts to text, streamed. A user's mistake is reported before torch is imported."""

from __future__ import annotations

import dataclasses
import io
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wikift.base import folders
from wikift.base.command import command_line, program_of
from wikift.base.console import print
from wikift.base.errors import EXIT_DONE, EXIT_INTERRUPTED, UserError
from wikift.base.files import read_lines
from wikift.base.launcher import launch
from wikift.commands.answers import print_answer, print_answers, sampling_of, speed
from wikift.commands.consolidate import model_source
from wikift.generation import prompts
from wikift.settings.checks import check_sampling, check_train, problems_of
from wikift.settings.fields import TrainSettings
from wikift.settings.options import Parsed, parse_all
from wikift.settings.resolve import resolve
from wikift.settings.run_fields import GenerateSettings

if TYPE_CHECKING:
    from wikift.generation.writer import Answer, Writer

Say = Callable[[str], None]


def main(argv: Sequence[str]) -> int:
    arguments = list(argv)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    training = arguments[end + 1 :] if end < len(arguments) else None
    parsed = parse_all(GenerateSettings, arguments[:end])
    settings, texts = parsed.checked(lambda settings: _checked(settings, training))
    say = _sayer(settings)
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):  # what a terminal cannot show, or a pipe cannot mean, does not end us
            stream.reconfigure(errors="replace")
    name = settings.model or str(folders.newest_run() or "")
    if not name:
        code, name = _train_first(training or [], settings)
        if code != EXIT_DONE:
            return code
    elif training:
        say(f"{name} has a model: no training, the settings after -- are ignored")
    source = model_source(name, say)
    say(f"loading {source} ...")
    from wikift.generation.writer import load_writer

    writer = load_writer(source, settings.device, settings.precision, say)
    if texts is None:
        from wikift.commands.session import converse

        return converse(writer, settings, source, say)
    if len(texts) == 1:
        say(speed(print_answer(writer, (0, texts[0]), settings, source, say, echo=not settings.quiet)))
    else:
        _answer_batches(writer, texts, settings, source, say)
    return EXIT_DONE


def _checked(settings: GenerateSettings, training: list[str] | None) -> tuple[GenerateSettings, list[str] | None]:
    """The settings, and the prompts asked for, None for an interactive session. Raises UserError with all problems."""
    problems = check_sampling(settings)
    if launch().size > 1:
        problems.append(f"torchrun: started {launch().size} processes, this command is one; start it with python")
    if training is not None and not settings.train:
        problems.append("--no-train: settings after -- are for training; remove one of the two")
    elif training is not None and settings.model is not None:
        problems.append(
            f"--: settings after it are for training, and MODEL {settings.model} is not trained here; remove them"
        )
    if settings.model is not None:
        problems += problems_of(lambda: folders.check_model(str(settings.model)))
    texts = list(prompts.EXAMPLES) if settings.examples else None
    if settings.prompt is not None:
        texts = [prompts.clean(settings.prompt)]
    if settings.prompts_file is not None:
        path = Path(settings.prompts_file)
        problems += problems_of(lambda: read_lines(path, "--prompts-file"))
        texts = read_lines(path, "--prompts-file") if not problems else None
    if problems:
        raise UserError(*problems)
    return dataclasses.replace(settings, stop=tuple(map(prompts.escapes, settings.stop))), texts


def _sayer(settings: GenerateSettings) -> Say:
    return lambda text: None if settings.quiet else print(f"wikift: {text}", file=sys.stderr, flush=True)


def _train_first(arguments: list[str], settings: GenerateSettings) -> tuple[int, str]:
    """Train in its own process, after asking on a terminal; returns (exit code, the run's folder).

    Raises UserError where training is not allowed or not wanted, or left no model.
    """
    parsed = parse_all(TrainSettings, arguments)
    resolved = resolve(parsed.settings, 1)
    parsed.refuse(check_train(resolved, 1, launched=False))
    run = str(resolved.output_dir)
    train = f"{command_line('train')} {shlex.join(arguments)}".rstrip()
    generate = f"{command_line('generate')} {shlex.quote(run)}"
    asks = sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()
    if settings.train:
        print(f"wikift: no trained model yet; training one first:\n  {train}", file=sys.stderr, flush=True)
    if settings.train and asks:
        print("train it now? [Y/n] ", end="", file=sys.stderr, flush=True)
    if not settings.train or (asks and sys.stdin.readline().strip().lower() not in ("", "y", "yes")):
        raise UserError(f"no trained model yet; train one first:\n    {train}\n    {generate}")
    quiet = ["--quiet"] if settings.quiet and not parsed.settings.quiet else []
    # a pipe's lines are prompts and its output is for answers, so the training gets neither
    output = None if sys.stdout.isatty() else sys.stderr.fileno()
    command = [*program_of("train"), *arguments, *quiet]
    child: list[subprocess.Popen[bytes]] = []

    def forward(number: int, frame: object) -> None:
        if child and number != signal.SIGINT:  # Ctrl-C reaches it from the terminal
            child[0].send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    child.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output))
    exit_code = child[0].wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    if exit_code == EXIT_DONE and not (folders.is_run(Path(run)) and folders.has_model(run)):
        raise UserError(f"{run}: the training left no checkpoint (a --dry-run?); there is no model to generate from")
    if exit_code == EXIT_INTERRUPTED:
        print(f"wikift: training was interrupted and saved; resume it:\n  {train}\n  {generate}", file=sys.stderr)
    return 128 - exit_code if exit_code < 0 else exit_code, run


def texts(parsed: Parsed[GenerateSettings], prompts_asked: Sequence[str]) -> Iterator[list[Answer]]:
    """For Python: the answers to each of the prompts, in order; nothing is printed."""
    settings, _ = parsed.checked(lambda settings: _checked(settings, None))
    source = model_source(str(settings.model), lambda text: None)
    from wikift.generation.writer import load_writer

    writer = load_writer(source, settings.device, settings.precision)
    yield from _in_order(writer, prompts_asked, settings, lambda text: None)


def _answer_batches(writer: Writer, texts: list[str], settings: GenerateSettings, source: str, say: Say) -> None:
    started, tokens = time.perf_counter(), 0
    for number, answers in enumerate(_in_order(writer, texts, settings, say)):
        tokens += sum(answer.new_tokens for answer in answers)
        print_answers(answers, settings, source, echo=not settings.quiet, first=number == 0)
    seconds = time.perf_counter() - started
    say(f"{len(texts):,} prompts, {tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:,.1f} tokens/s")


def _in_order(writer: Writer, texts: Sequence[str], settings: GenerateSettings, say: Say) -> Iterator[list[Answer]]:
    """Batches of prompts of like length, the shortest first; answers are passed on when all before them are."""
    # in characters: to sort by tokens every prompt would be encoded twice
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    several = settings.num_return_sequences
    together = max(1, settings.batch_size // several)
    ready: dict[int, list[Answer]] = {}
    passed = 0
    for batch in (order[first : first + together] for first in range(0, len(order), together)):
        notes: list[str] = []
        numbered = [(number, texts[number]) for number in batch]
        answers = writer.answers(numbered, sampling_of(settings), note=notes.append)
        for text in dict.fromkeys(notes):
            say(text)
        ready.update({number: answers[k * several : (k + 1) * several] for k, number in enumerate(batch)})
        while passed in ready:
            yield ready.pop(passed)
            passed += 1
