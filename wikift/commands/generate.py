"""launch/generate.py: prompts to text, streamed as it is made.

The interactive loop is `session`, one answer is `writer`. A user's mistake is reported before torch is imported.
"""

from __future__ import annotations

import dataclasses
import io
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wikift.base import folders
from wikift.base.errors import UserError
from wikift.base.files import read_lines
from wikift.commands.consolidate import model_source
from wikift.commands.main import EXIT_DONE, EXIT_INTERRUPTED
from wikift.generation import prompts
from wikift.settings.checks import check_train, problems_of
from wikift.settings.fields import EXCLUSIVE, GenerateSettings, TrainSettings
from wikift.settings.generate_checks import SAMPLING, check_sampling, with_defaults
from wikift.settings.options import parse
from wikift.settings.run_plan import ranks_started, resolve

if TYPE_CHECKING:
    from wikift.generation.sampler import Sampling
    from wikift.generation.writer import Answer, Writer

DESCRIPTION = "Let a trained model continue a prompt. Without a prompt it is interactive."
EPILOG = """examples:
  python launch/generate.py                              the newest run, interactive
  python launch/generate.py runs/NAME --prompt "The Renaissance was"
  python launch/generate.py runs/NAME --examples --json --seed 7
  python launch/generate.py runs/NAME --prompts-file FILE --batch-size 32 --stop "\\n" --json
  python launch/generate.py -- --dataset demo --from-scratch
                     where runs/ has no model yet: what follows -- goes to launch/train.py"""
# C0 without tab and newline, delete, C1: a model may make them, and a terminal obeys them
_CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\N{REPLACEMENT CHARACTER}")
_ROOT = Path(__file__).resolve().parents[2]


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    arguments = list(argv)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    training = arguments[end + 1 :] if end < len(arguments) else None
    settings = parse(
        GenerateSettings, arguments[:end], prog="launch/generate.py", description=DESCRIPTION, epilog=EPILOG
    )
    settings = dataclasses.replace(settings, stop=tuple(map(prompts.escapes, settings.stop)))
    texts = _check(settings, training)
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):  # what a terminal cannot show, or a pipe cannot mean, does not end us
            stream.reconfigure(errors="replace")
    name = settings.model or str(folders.newest_run() or "")
    if not name:
        code, name = _train_first(training or [], settings)
        if code != EXIT_DONE:
            return code
    elif training:
        _sayer(settings)(f"{name} has a model, so nothing is trained and what follows -- is not used")
    return _answer_all(settings, name, texts)


def _check(settings: GenerateSettings, training: list[str] | None) -> list[str] | None:
    """The prompts asked for, None for an interactive session. Raises UserError with all that is wrong."""
    problems = check_sampling(settings)
    sources = {
        "--prompt": settings.prompt is not None,
        "--prompts-file": settings.prompts_file is not None,
        "--examples": settings.examples,
    }
    chosen = [name for name, used in sources.items() if used]
    if len(chosen) > 1:
        problems.append(f"{' and '.join(chosen)}: each says what to answer; keep one of them")
    if ranks_started() > 1:
        problems.append(f"torchrun: started {ranks_started()} processes, this is work for one; start it with python")
    if training is not None and not settings.train:
        problems.append("--no-train: what follows -- is for a training; remove one of the two")
    elif training is not None and settings.model is not None:
        problems.append(f"--: what follows is for a training, and there is none for {settings.model}; remove it")
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
    return texts


def sampling_of(settings: GenerateSettings) -> Sampling:
    """The settings that shape a text, as the writer takes them."""
    from wikift.generation.sampler import Sampling

    values = with_defaults(settings)
    return Sampling(**{field.name: getattr(values, field.name) for field in dataclasses.fields(Sampling)})


def _sayer(settings: GenerateSettings) -> Callable[[str], None]:
    return lambda text: None if settings.quiet else print(f"wikift: {text}", file=sys.stderr, flush=True)


def _train_first(arguments: list[str], settings: GenerateSettings) -> tuple[int, str]:
    """Train in a process of its own, which frees its memory at its end; returns (exit code, the run's folder).

    Asks first on a terminal. Raises UserError where training is not allowed or not wanted, or left no model.
    """
    parsed = parse(TrainSettings, arguments, prog="launch/train.py", description="", exclusive=EXCLUSIVE)
    resolved = resolve(parsed, 1)
    if problems := check_train(resolved, 1, launched=False):
        raise UserError(*problems)
    run = str(resolved.output_dir)
    train, generate = f"python launch/train.py {shlex.join(arguments)}".rstrip(), f"python launch/generate.py {run}"
    asks = sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()
    if settings.train:
        print(f"wikift: no trained model yet; training one first:\n  {train}", file=sys.stderr, flush=True)
    if settings.train and asks:
        print("train it now? [Y/n] ", end="", file=sys.stderr, flush=True)
    if not settings.train or (asks and sys.stdin.readline().strip().lower() not in ("", "y", "yes")):
        raise UserError(f"no trained model yet; make one and try again:\n    {train}\n    {generate}")
    code = f"import sys; sys.path.insert(0, {str(_ROOT)!r})\n"
    code += "from wikift.commands.main import run; from wikift.commands.train import main; run(main)"
    quiet = ["--quiet"] if settings.quiet and not parsed.quiet else []
    child: list[subprocess.Popen[bytes]] = []

    def forward(number: int, frame: object) -> None:
        if child and number != signal.SIGINT:  # Ctrl-C reaches it from the terminal
            child[0].send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    # a pipe's lines are prompts and its output is for answers, so the training gets neither
    output = None if sys.stdout.isatty() else sys.stderr.fileno()
    child += [
        subprocess.Popen([sys.executable, "-c", code, *arguments, *quiet], stdin=subprocess.DEVNULL, stdout=output)
    ]
    exit_code = child[0].wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    if exit_code == EXIT_DONE and not (folders.is_run(Path(run)) and folders.has_model(run)):
        raise UserError(f"{run}: the training left no checkpoint there (a --dry-run?); nothing to answer from")
    if exit_code == EXIT_INTERRUPTED:
        print(f"wikift: the training is saved; resume it:\n  {train}\n  {generate}", file=sys.stderr)
    return 128 - exit_code if exit_code < 0 else exit_code, run


def _answer_all(settings: GenerateSettings, name: str, texts: list[str] | None) -> int:
    say = _sayer(settings)
    source = model_source(name, say)
    from wikift.generation.writer import load_writer

    writer = load_writer(source, settings.device, settings.precision, settings.compile)
    if writer.warning:
        say(writer.warning)
    say(f"{source}, {writer.parameters:,} parameters on {writer.device}")
    if texts is None:
        from wikift.commands.session import converse

        return converse(writer, settings, source, say)
    if len(texts) == 1:
        say(speed(print_answer(writer, (0, texts[0]), settings, source, say, echo=not settings.quiet)))
    else:
        _answer_batches(writer, texts, settings, source, say)
    return EXIT_DONE


def _answer_batches(
    writer: Writer, texts: list[str], settings: GenerateSettings, source: str, say: Callable[[str], None]
) -> None:
    """Batches of prompts of like length, the shortest first; an answer is printed when all before it are."""
    started = time.perf_counter()
    # characters tell the length well enough, and an order made of tokens would encode every prompt twice
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    several = settings.num_return_sequences
    together = max(1, settings.batch_size // several)
    ready: dict[int, list[Answer]] = {}
    printed = tokens = 0
    for batch in (order[first : first + together] for first in range(0, len(order), together)):
        notes: list[str] = []
        numbered = [(number, texts[number]) for number in batch]
        answers = writer.answers(numbered, sampling_of(settings), note=notes.append)
        for text in dict.fromkeys(notes):
            say(text)
        ready.update({number: answers[k * several : (k + 1) * several] for k, number in enumerate(batch)})
        tokens += sum(answer.new_tokens for answer in answers)
        while printed in ready:
            _print_answers(ready.pop(printed), settings, source, echo=not settings.quiet, first=printed == 0)
            printed += 1
    seconds = time.perf_counter() - started
    say(f"{len(texts):,} prompts, {tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:,.1f} tokens/s")


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
    if settings.json or settings.num_return_sequences > 1 or settings.num_beams > 1:
        answers = writer.answers([prompt], sampling, note=say, stopped=stopped)
        _print_answers(answers, settings, source, echo=echo, first=True)
        return answers
    _write(prompt[1] if echo else "")
    answers = writer.answers([prompt], sampling, write=_write, note=say, stopped=stopped)
    print(flush=True)
    return answers


def _print_answers(
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
    """One answer, with the settings that made it, as one line."""
    values = with_defaults(settings)
    sampling = {name: getattr(values, name) for name in SAMPLING}
    facts = {name: value for name, value in dataclasses.asdict(answer).items() if name != "logprobs" or value}
    return json.dumps({"model": source, **facts, **sampling, "precision": settings.precision}, ensure_ascii=False)


def speed(answers: Iterable[Answer]) -> str:
    """`12 tokens in 0.6 s, 20 tokens/s` for what was written at once."""
    sizes, times = zip(*((answer.new_tokens, answer.seconds) for answer in answers), strict=True)
    return f"{sum(sizes):,} tokens in {max(times):.1f} s, {sum(sizes) / max(*times, 1e-3):,.1f} tokens/s"


def _write(text: str) -> None:
    print(text.translate(_CONTROLS) if sys.stdout.isatty() else text, end="", flush=True)
