"""The train command: settings -> store -> plan -> run. What can be said without torch is said before torch loads."""

from __future__ import annotations

import dataclasses
import importlib
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wikift import __version__
from wikift.base import folders, hub
from wikift.base.console import print
from wikift.base.errors import EXIT_DONE, EXIT_INTERRUPTED, EnvironmentFault, UserError
from wikift.base.launcher import launch, unused_settings
from wikift.base.model_files import open_model, shape_of
from wikift.base.shape import Shape
from wikift.settings import deepspeed
from wikift.settings.batch_layout import BatchLayout, batch_layout
from wikift.settings.checks import check_train, problems_of
from wikift.settings.fields import TrainSettings, trackers_of
from wikift.settings.options import Parsed, flag, parse_all
from wikift.settings.resolve import resolve, store_path
from wikift.settings.run_plan import RunPlan, apply_scratch, plan_run, vocabulary_problems
from wikift.watch.trackers import wandb_disabled

if TYPE_CHECKING:
    from wikift.data.store import TokenStore


Say = Callable[[str], None]


def main(argv: Sequence[str]) -> int:
    parsed = parse_all(TrainSettings, without_local_rank(argv))
    if parsed.settings.dry_run:
        return int(importlib.import_module("wikift.commands.plan").main(argv))
    return EXIT_INTERRUPTED if train(parsed)[1] else EXIT_DONE


def train(parsed: Parsed[TrainSettings]) -> tuple[Path, int]:
    """Train to the end or to a stop; returns the run's folder and the signal that stopped it, else 0."""
    settings, notes = resolved(parsed, launch().size)
    prints = launch().rank == 0 and not settings.quiet

    def say(text: str) -> None:
        if prints:
            print(text, flush=True)

    say(f"wikift {__version__}: {settings.model}, into {settings.output_dir}")
    for note in notes:
        say(note)
    store = _bring(settings, prints, say)
    run_plan = plan_of(settings, batch_layout(settings, launch().size), store, model_of(settings)[0])

    from wikift.watch.terminal import phase

    with phase("loading transformers" if launch().size > 1 else "loading torch", say):
        from wikift.training.run import train_run

    return run_plan.output_dir, train_run(run_plan, store, say)


def resolved(parsed: Parsed[TrainSettings], ranks: int, further: Sequence[str] = ()) -> tuple[TrainSettings, list[str]]:
    """The settings with what follows from them, and what to tell of it. Raises UserError with all that is wrong."""
    asked = parsed.settings
    merged = deepspeed.merge(asked, parsed.typed)
    settings = resolve(merged.settings, ranks)
    checks = check_train(settings, ranks, launched=launch().started or ranks > 1) + _data_problems(settings, asked)
    if launch().restarts and settings.resume != "auto":
        checks.append(
            f"--resume {settings.resume}: would go back at each restart (torchrun --max-restarts {launch().restarts}); "
            "start once without --max-restarts, or remove it"
        )
    parsed.refuse([*further, *merged.problems, *deepspeed.with_keys(checks, merged)])
    notes = list(merged.notes)
    if wandb_disabled() and "wandb" in trackers_of(settings):
        notes.append("WANDB_DISABLED is set: nothing goes to Weights & Biases")
    if names := unused_settings():
        notes.append(f"not used by wikift: {', '.join(names)}")
    if asked.data is None and asked.dataset is None and ranks == 1:
        notes.append("one process: falling back to wikitext-2-v1 (torchrun starts several, and wikitext-103-v1)")
    return settings, notes


def without_local_rank(argv: Sequence[str]) -> list[str]:
    """`argv` less the --local_rank=N that DeepSpeed's launcher appends, beside LOCAL_RANK."""
    return [argument for argument in argv if not re.fullmatch(r"--local[_-]rank=\d+", argument)]


def checked_files(settings: TrainSettings, store: TokenStore | None) -> tuple[Shape | None, list[str]]:
    """Check of model and tokenizer all that a run checks, without the weights; the model's shape, and notes."""
    try:
        shape, notes = model_of(settings, download=False)
        _check_tokenizer(settings, store, shape)
        return shape, notes
    except EnvironmentFault as fault:
        return shape_of(settings.model), [f"model and tokenizer are not checked: {fault}"]


def model_of(settings: TrainSettings, *, download: bool = True) -> tuple[Shape, list[str]]:
    """The shape of what is trained, before --config-overrides, and what to know of it; its files are checked."""
    known = shape_of(settings.model) if settings.from_scratch else None
    if known is None and (resumed := _resumed_model(settings)) is not None:
        known = shape_of(str(resumed))
    if known is None and settings.from_scratch:
        known = shape_of(settings.model, fetched=True)
    if known is not None:
        return known, []
    shape, _, notes = open_model(settings.model, download=download)
    return shape, notes


def _data_problems(settings: TrainSettings, asked: TrainSettings) -> list[str]:
    """What is wrong with the store or the text, as far as it shows at once; `asked` before derivations."""
    from wikift.commands.prepare import data_problems
    from wikift.data.store import open_store

    data = settings.data
    if data is not None:
        return problems_of(lambda: open_store(data))
    # a tokenizer that follows from --model is not complained of beside a wrong --model
    tokenizer = settings.tokenizer if folders.is_model(Path(settings.model)) else asked.tokenizer or "gpt2"
    return data_problems(dataclasses.replace(settings, tokenizer=tokenizer))


def plan_of(settings: TrainSettings, layout: BatchLayout, store: TokenStore, shape: Shape) -> RunPlan:
    if problems := _split_problems(settings, store):
        raise UserError(*problems)
    shape = apply_scratch(settings, shape, store.vocab_size)
    plan = plan_run(settings, layout, shape, store.splits["train"].tokens, store.vocab_size)
    blocks = -(-(store.splits["validation"].tokens - 1) // plan.block_size) if store.has_validation else 0
    if plan.eval_blocks >= blocks > 0:
        asked = f"--max-eval-samples {plan.eval_blocks}"
        raise UserError(f"{asked}: has no effect, validation has {blocks} blocks; remove it")
    return plan


def _split_problems(settings: TrainSettings, store: TokenStore) -> list[str]:
    problems = []
    if "train" not in store.splits:
        splits = ", ".join(store.splits)
        problems.append(f"--data {store.path}: has no train split, only {splits}; prepare a dataset that has one")
    for name in ("eval_steps", "early_stopping_patience", "max_eval_samples"):
        value = getattr(settings, name)
        if value is not None and not store.has_validation:
            problems.append(
                f"{flag(name)} {value}: has no effect, {store.path} has no validation text; prepare with "
                "--validation-fraction, or remove it"
            )
    return problems


def _bring(settings: TrainSettings, prints: bool, say: Say) -> TokenStore:
    """The store, prepared first where it is missing, and the model's files in the Hub's cache.

    By the first process of each host, before any process group exists; the others find store and model then.
    """
    from wikift.data.store import open_store

    path = Path(settings.data) if settings.data is not None else store_path(settings)
    if not prints:
        hub.be_quiet()

    def bring() -> None:
        if settings.data is None:
            from wikift.base.names import CUT_SEED
            from wikift.commands.prepare import make_store

            make_store(settings, CUT_SEED, path, quiet=not prints, say=say)
        _check_tokenizer(settings, open_store(path), None)
        model_of(settings)

    if launch().size > 1:
        from wikift.watch.terminal import phase

        with phase("loading torch", say):
            from wikift.base.world import first_on_each_host

        first_on_each_host(bring, settings.hang_timeout)
    else:
        bring()
    return open_store(path)


def _check_tokenizer(settings: TrainSettings, store: TokenStore | None, shape: Shape | None) -> None:
    """Raises UserError where the store, or the tokenizer that it will be made with, does not fit the model."""
    from wikift.data.store import check_tokenizer
    from wikift.data.tokenizer import load_tokenizer, tokenizer_problems

    name = str(settings.tokenizer)
    if store is None and shape is not None and not name.startswith("train:"):
        with tempfile.TemporaryDirectory() as copy:
            size = load_tokenizer(name, Path(copy)).vocab_size
        if problems := vocabulary_problems(settings, apply_scratch(settings, shape, size), size):
            raise UserError(*problems)
    own = settings.data is None and settings.tokenizer == settings.model  # a store that was made with it needs no look
    bare = Path(settings.model).is_dir() and tokenizer_problems(settings.model)
    if store is not None and not (settings.from_scratch or own or bare or _resumed_model(settings)):
        check_tokenizer(store, settings.model)


def _resumed_model(settings: TrainSettings) -> Path | None:
    """The model/ of the run that is resumed: with it a run needs no Hub."""
    run = Path(settings.output_dir or "") if settings.resume == "auto" else Path(settings.resume).parent.parent
    return run / "model" if settings.resume != "never" and folders.list_checkpoints(run) else None
