"""launch/evaluate.py: models scored on one split of a store, as a table or as JSON. How they are scored: scoring.py."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wikift import folders
from wikift.cli import parse
from wikift.command import EXIT_DONE
from wikift.config import EvaluateSettings
from wikift.errors import UserError
from wikift.export import model_source
from wikift.scoring import Score, score_split
from wikift.shape import shape_of
from wikift.tokens import TokenStore, check_tokenizer, open_store

if TYPE_CHECKING:
    from torch import Tensor

    from wikift.world import World


EPILOG = """examples:
  python launch/evaluate.py runs/gpt2-wikitext-2-v1
  python launch/evaluate.py gpt2 runs/gpt2-wikitext-2-v1/hf --data data/wikitext-2-v1-gpt2 --split test --stride 512
  torchrun --nproc_per_node=4 launch/evaluate.py gpt2-xl --data data/wikitext-103-v1-gpt2 --json"""

_COLUMNS = ("model", "split", "context", "stride", "tokens", "words", "token ppl", "word ppl", "bits/byte")


@dataclasses.dataclass(frozen=True)
class _Task:
    """One model to score: as named, its store, and the window. `positions` is None where only the Hub knows them."""

    name: str
    store: TokenStore
    positions: int | None


def main(argv: Sequence[str]) -> int:
    """launch/evaluate.py, on one process or under torchrun."""
    settings = parse(
        EvaluateSettings,
        argv,
        prog="launch/evaluate.py",
        description="Perplexity per token and per word, and bits per byte, of models on one split of a store.",
        epilog=EPILOG,
    )
    tasks = _check(settings)
    if settings.generation:
        from wikift import textquality

        sources = [(task.name, model_source(task.name, lambda text: None), task.store) for task in tasks]
        textquality.report(sources, settings.split, device=settings.device, as_json=settings.json)
        return EXIT_DONE

    from wikift.world import started_world

    with started_world(settings.device) as world:
        for number, task in enumerate(tasks):
            score, facts = _score_model(task, settings, world)
            if world.rank != 0:
                continue
            if settings.json:
                print(_as_json(task, score, settings, facts), flush=True)
                continue
            if number == 0 and (head := _line(_COLUMNS, tasks)):
                print(head)
            print(_line(_cells(task, score, settings), tasks), flush=True)
    return EXIT_DONE


def _check(settings: EvaluateSettings) -> list[_Task]:
    """The models with their stores. Raises UserError with every problem that shows without loading a model."""
    problems = [] if settings.models else ["MODEL: is missing; name a run (runs/NAME), a model folder or a Hub name"]
    for name in ("context", "stride", "per_device_eval_batch_size"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            problems.append(f"--{name.replace('_', '-')} {value}: must be 1 or more")
    if settings.context is not None and settings.stride is not None and settings.stride > settings.context:
        problems.append(
            f"--stride {settings.stride}: must be at most --context {settings.context}, or windows leave tokens out"
        )
    stores: dict[str, TokenStore] = {}
    tasks = []
    for name in settings.models:
        try:
            tasks.append(_task(name, settings, stores))
        except UserError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    if problems:
        raise UserError(*problems)
    return tasks


def _task(name: str, settings: EvaluateSettings, stores: dict[str, TokenStore]) -> _Task:
    if not folders.has_model(name):
        raise UserError(f"{name}: has no trained model; train it first: python launch/train.py --output-dir {name}")
    run = folders.run_of(name)
    data = settings.data
    if data is None:
        if run is None:
            raise UserError(
                f"--data: is missing, {name} is no run that would know its store; name one of launch/prepare.py"
            )
        data = str(folders.run_config(run)["store_path"])
    if data not in stores:
        stores[data] = open_store(data)
    store = stores[data]
    problems = []
    if settings.split not in store.splits:
        problems.append(f"--split {settings.split}: {store.path} has {', '.join(store.splits)}; take one of these")
    elif store.splits[settings.split].tokens < 2:
        problems.append(f"--split {settings.split}: {store.path} has no token to predict in it; take another")
    folder = Path(name) / "model" if folders.is_run(Path(name)) else Path(name)
    shape = shape_of(str(folder) if folder.is_dir() else name)
    if folder.is_dir():
        check_tokenizer(store, folder, setting="MODEL")
    if shape is not None:
        problems += _window_problems(name, settings, shape.n_positions)
    if problems:
        raise UserError(*problems)
    return _Task(name, store, shape.n_positions if shape is not None else None)


def _window_problems(name: str, settings: EvaluateSettings, positions: int) -> list[str]:
    if settings.context is not None and settings.context > positions:
        return [f"--context {settings.context}: {name} has {positions} positions; take that or less"]
    if settings.context is None and settings.stride is not None and settings.stride > positions:
        return [f"--stride {settings.stride}: must be at most the context of {name}, {positions}"]
    return []


def _score_model(task: _Task, settings: EvaluateSettings, world: World) -> tuple[Score, dict[str, Any]]:
    """Load and score one model; collective."""
    import torch
    from transformers.utils import logging as transformers_logging

    from wikift.model import NextTokenLoss, autocast, load_model, resolve_precision

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()

    def say(text: str) -> None:
        if world.rank == 0 and not settings.quiet:
            print(f"wikift: {text}", file=sys.stderr, flush=True)

    if world.rank == 0:  # a run is exported by one process
        model_source(task.name, say)
    world.barrier()
    source = model_source(task.name, lambda text: None)
    model = load_model(source, world.device, "MODEL")
    positions = model.config.n_positions
    if task.positions is None:
        _check_loaded(task, settings, source, positions)
    precision = resolve_precision(settings.precision, world.device)
    if precision.warning:
        say(precision.warning)
    losses = NextTokenLoss(model)

    def nll(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.inference_mode(), autocast(world.device, precision.name):
            return losses(inputs.to(world.device), targets.to(world.device)).double().sum()  # type: ignore[no-any-return]

    context = settings.context or positions
    started = time.perf_counter()
    score = score_split(
        nll,
        task.store,
        settings.split,
        context=context,
        stride=settings.stride or context,
        batch=settings.per_device_eval_batch_size,
        world=world,
        progress=_progress(task.name) if world.rank == 0 and not settings.quiet else None,
    )
    seconds = round(time.perf_counter() - started, 3)
    return score, {"precision": precision.name, "processes": world.size, "seconds": seconds}


def _check_loaded(task: _Task, settings: EvaluateSettings, source: str, positions: int) -> None:
    """What could not be known before a model came from the Hub."""
    if problems := _window_problems(task.name, settings, positions):
        raise UserError(*problems)
    from transformers import AutoTokenizer

    from wikift.tokenizer import tokenizer_fingerprint

    if tokenizer_fingerprint(AutoTokenizer.from_pretrained(source)) != task.store.tokenizer_fingerprint:
        raise UserError(
            f"MODEL {task.name}: its tokenizer is not the one that made {task.store.path}; name another --data"
        )


def _progress(name: str) -> Callable[[int, int], None] | None:
    """A line on a terminal that counts windows and is gone at the end; nothing in a pipe."""
    if not sys.stderr.isatty():
        return None
    started = time.perf_counter()
    shown = 0.0

    def tell(done: int, count: int) -> None:
        nonlocal shown
        now = time.perf_counter()
        if done < count and now - shown < 0.5:
            return
        shown = now
        left = (now - started) / done * (count - done)
        width = shutil.get_terminal_size().columns - 1
        text = f"{name}: {done:,} of {count:,} windows, {left:,.0f} s left"[:width] if done < count else ""
        print("\r\x1b[K" + text, end="", file=sys.stderr, flush=True)

    return tell


def _cells(task: _Task, score: Score, settings: EvaluateSettings) -> tuple[str, ...]:
    counts = (score.context, score.stride, score.tokens, score.words)
    return (
        task.name,
        settings.split,
        *(f"{count:,}" for count in counts),
        *(f"{value:,.2f}" if value < 1e6 else f"{value:.3g}" for value in (score.perplexity, score.word_perplexity)),
        f"{score.bits_per_byte:.4f}",
    )


def _line(cells: Sequence[str], tasks: Sequence[_Task]) -> str:
    """One line of the table; on a terminal too narrow for it, a line per column."""
    first = max(len(task.name) for task in tasks) if tasks else 0
    widths = (max(first, 5), 10, 7, 7, 11, 11, 10, 10, 9)
    if sys.stdout.isatty() and sum(widths) + 2 * len(widths) > shutil.get_terminal_size().columns:
        if cells is _COLUMNS:
            return ""
        return "\n".join(f"{name:<10} {cell}" for name, cell in zip(_COLUMNS, cells, strict=True)) + "\n"
    left = [f"{cell:<{width}}" for cell, width in zip(cells[:2], widths, strict=False)]
    right = [f"{cell:>{width}}" for cell, width in zip(cells[2:], widths[2:], strict=True)]
    return "  ".join(left + right)


def _as_json(task: _Task, score: Score, settings: EvaluateSettings, facts: dict[str, Any]) -> str:
    content: dict[str, Any] = {"model": task.name, "data": str(task.store.path), "split": settings.split}
    content |= dataclasses.asdict(score)
    for name in ("loss", "perplexity", "word_perplexity", "bits_per_byte"):
        value = getattr(score, name)
        content[name] = value if math.isfinite(value) else None
    return json.dumps(content | facts, ensure_ascii=False)
