"""The evaluate command: models scored by the field's protocols on one text, as a table or JSON."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from wikift.base import folders
from wikift.base.command import command_line
from wikift.base.console import Progress, print
from wikift.base.errors import EXIT_DONE, UserError
from wikift.base.files import read_json
from wikift.base.launcher import launch
from wikift.base.model_files import shape_of
from wikift.base.names import EXPORT_RECORD
from wikift.commands.consolidate import model_source
from wikift.commands.prepare import source_of
from wikift.data.sources import source_problems
from wikift.data.store import TokenStore, check_tokenizer, open_store
from wikift.evaluation.protocols import PROTOCOLS, Protocol, loaded_scorer, measure, setups
from wikift.evaluation.report import Result, as_json, keep, table
from wikift.evaluation.text import Text, splits_of, text_of_dataset, text_of_store
from wikift.settings.checks import check_data, problems_of
from wikift.settings.fields import DataSettings
from wikift.settings.options import parse_all
from wikift.settings.run_fields import EvaluateSettings

if TYPE_CHECKING:
    from wikift.base.world import World


def main(argv: Sequence[str]) -> int:
    """The command, on one process or under torchrun."""
    parsed = parse_all(EvaluateSettings, argv)
    store, settings = parsed.checked(check), parsed.settings
    results: list[Result] = []
    text = _text(settings, store)
    if launch().rank == 0 and not settings.quiet:
        print("wikift: loading torch ...", file=sys.stderr, flush=True)

    from wikift.base.failure import started_world

    with started_world(settings.device) as world:
        try:
            for result in _results(settings, text, world):
                results.append(result)
                if world.rank == 0 and settings.json:
                    print(as_json(result, results), flush=True)
        finally:  # also the results before a Ctrl-C
            if world.rank == 0 and results and not settings.json:
                width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
                print(table(results, text.notes, width), flush=True)
    return EXIT_DONE


def run(settings: EvaluateSettings) -> list[Result]:
    """The results, model by model, the same on every rank. Raises UserError with every problem of the settings."""
    text = _text(settings, check(settings))

    from wikift.base.failure import started_world

    with started_world(settings.device) as world:
        return list(_results(dataclasses.replace(settings, quiet=True), text, world))


def _results(settings: EvaluateSettings, text: Text, world: World) -> Iterator[Result]:
    """Everything that the settings ask for, model by model; collective. Raises UserError as `check` does."""
    quiet = settings.quiet or world.rank != 0

    def say(line: str) -> None:
        if not quiet:
            print(f"wikift: {line}", file=sys.stderr, flush=True)

    splits, protocols = _splits(settings, text.splits(), text.name), _protocols(settings, text)
    for name in settings.models:
        if world.rank == 0:  # a run is exported by one process
            model_source(name, say)
        world.barrier()
        source = model_source(name, lambda line: None)
        with loaded_scorer(source, settings.precision, world, say) as scorer:
            if text.store is not None and scorer.tokenizer.fingerprint != text.store.tokenizer_fingerprint:
                reason = f"its tokenizer is not the one that made {text.store.path}"
                raise UserError(f"MODEL {name}: {reason}; name the text with --dataset")
            _check_windows(name, settings, scorer.positions)  # for a model that only the Hub knows
            made = [s for p in protocols for s in setups(p, scorer.positions, settings.context, settings.stride)]
            jobs = [(split, setup) for split in splits for setup in made]
            for number, (split, setup) in enumerate(jobs, 1):
                progress = Progress(quiet)
                tell = partial(progress.fraction, f"{name}, {split}, {setup.protocol.name} ({number} of {len(jobs)})")
                batch = settings.per_device_eval_batch_size
                try:
                    score = measure(scorer, text, split, setup, batch=batch, world=world, progress=tell)
                finally:
                    progress.clear()
                seconds = round(time.monotonic() - progress.started, 3)
                facts = {"precision": scorer.precision, "processes": world.size, "seconds": seconds}
                result = Result(name, text.name, split, setup, score, scorer.tokenizer.fingerprint, facts)
                if world.rank == 0 and (run := folders.run_of(name)) is not None:
                    exported = read_json(run / "hf" / EXPORT_RECORD).get("step")
                    try:
                        keep(result, run / folders.EVALUATIONS, exported)
                    except OSError as error:  # somebody else's run may be evaluated, too
                        say(f"the score is not kept for wikift report: {error}")
                yield result


def check(settings: EvaluateSettings) -> TokenStore | None:
    """The store to evaluate on, None with `--dataset`.

    Raises UserError with every problem that shows without loading a model or reading text.
    """
    problems = [] if settings.models else ["MODEL: required; a run (runs/NAME), a model folder or a Hub name"]
    if settings.context is not None and settings.stride is not None and settings.stride > settings.context:
        problems.append(f"--stride {settings.stride}: must be at most --context {settings.context}")
    if settings.protocol == "lm-eval" and settings.stride is not None:
        problems.append(f"--stride {settings.stride}: has no effect, the windows of lm-eval are disjoint; omit it")
    if repeated := sorted({name for name in settings.models if settings.models.count(name) > 1}):
        problems.append(f"MODEL {repeated[0]}: is named twice; omit one")
    store = None
    try:
        store = _store(settings)
    except UserError as error:
        problems += error.problems
    for name in settings.models:
        problems += [p for p in problems_of(partial(_check_model, name, settings, store)) if p not in problems]
    if problems:
        raise UserError(*problems)
    return store


def _store(settings: EvaluateSettings) -> TokenStore | None:
    """The store that the settings name. Raises UserError for every problem with it, or with `--dataset`."""
    if settings.dataset is not None:
        asked = _text_settings(settings)
        problems = check_data(asked) + source_problems(source_of(asked))
        if problems:
            raise UserError(*problems)
        return None
    runs = [run for name in settings.models if (run := folders.run_of(name)) is not None]
    paths = [settings.data] if settings.data else [str(folders.run_config(run)["store_path"]) for run in runs]
    stores = [open_store(path, verify=True) for path in paths]
    if not stores and not settings.models:
        return None  # a problem of its own
    if not stores:
        raise UserError(
            f"--data: required, {settings.models[0]} is not a run and has no record of its data; name a token store "
            f"({command_line('prepare')}), or a text with --dataset"
        )
    if len({store.fingerprint for store in stores}) > 1:
        raise UserError("--data: required, the runs were trained on different stores; name one for all of them")
    _splits(settings, splits_of(stores[0]), str(stores[0].path))
    return stores[0]


def _text_settings(settings: EvaluateSettings) -> DataSettings:
    return DataSettings(settings.dataset, settings.dataset_config, None, settings.text_column, settings.encoding)


def _text(settings: EvaluateSettings, store: TokenStore | None) -> Text:
    return text_of_store(store) if store is not None else text_of_dataset(source_of(_text_settings(settings)))


def _check_model(name: str, settings: EvaluateSettings, store: TokenStore | None) -> None:
    folders.check_model(name)
    folder = Path(name) / "model" if folders.is_run(Path(name)) else Path(name)
    if (shape := shape_of(str(folder), "MODEL")) is not None:
        _check_windows(name, settings, shape.n_positions)
    if folder.is_dir() and store is not None:
        check_tokenizer(store, folder, setting="MODEL")


def _check_windows(name: str, settings: EvaluateSettings, positions: int) -> None:
    setting = "context" if settings.context is not None else "stride"
    if (tokens := getattr(settings, setting)) is not None and tokens > positions:
        raise UserError(f"--{setting} {tokens}: {name} has {positions} positions; use that or less")


def _splits(settings: EvaluateSettings, known: list[str], text: str) -> list[str]:
    """The chosen split, or all but train if there are others. Raises UserError for one that is not `known`."""
    if not known:
        raise UserError(f"--data: no split of {text} has two tokens or more, so none can be predicted; name another")
    if settings.split is not None and settings.split not in known:
        raise UserError(f"--split {settings.split}: {text} has {', '.join(known)}; use one of these")
    return [settings.split] if settings.split is not None else [name for name in known if name != "train"] or known


def _protocols(settings: EvaluateSettings, text: Text) -> list[Protocol]:
    name = settings.protocol
    if name is None and settings.context is None and settings.stride is None:
        return [p for p in PROTOCOLS.values() if p.name != "free" and (p.from_store or text.corpus is not None)]
    protocol = PROTOCOLS[name or "free"]
    if text.corpus is None and not protocol.from_store:
        reason = f"needs the text, not only its tokens; name it with --dataset ({text.missing})"
        raise UserError(f"--protocol {name}: {reason}")
    return [protocol]
