"""The evaluate command: models scored by the field's protocols on one text, as a table, JSON or CSV.

The protocols are in protocols.py, the sums in scoring.py, measure.py puts them together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wikift.base import folders
from wikift.base.command import command_line
from wikift.base.errors import EXIT_DONE, UserError
from wikift.base.shape import shape_of
from wikift.data.store import check_tokenizer
from wikift.evaluation.measure import Setup, loaded_scorer, measure
from wikift.evaluation.protocols import CONTEXT, PROTOCOLS, Protocol
from wikift.evaluation.report import Result, as_csv, as_json, table
from wikift.evaluation.text import Text, check_text, open_text
from wikift.settings.fields import EvaluateSettings
from wikift.settings.options import flag, parse_all

if TYPE_CHECKING:
    from wikift.base.world import World


EPILOG = """examples:
  wikift evaluate runs/gpt2-wikitext-2-v1
  wikift evaluate gpt2 runs/mine/hf --dataset wikitext-103-raw-v1 --split test
  wikift evaluate gpt2 --dataset wikitext-2-raw-v1 --protocol lm-eval --split test
  torchrun --nproc_per_node=4 -m wikift evaluate gpt2-xl --data data/wikitext-103-raw-v1-gpt2 --context 1024 --stride 64

protocols:
  hf-doc   transformers' page on perplexity: rows joined by blank lines, strides 1024 and 512, per token
  blocks   run_clm.py's disjoint blocks, nothing dropped, per token and word
  knn      neulab/knn-transformers: context 1024, stride 512, per token and word
  paper    the GPT-2 paper: detokenized text, per original word
  lm-eval  lm-evaluation-harness' task wikitext: detokenized pages, per original word and byte
  free     --context and --stride as you like; the same without --protocol"""


def main(argv: Sequence[str]) -> int:
    """The command, on one process or under torchrun."""
    parsed = parse_all(
        EvaluateSettings,
        argv,
        prog="wikift evaluate",
        description="Perplexity of models by the field's protocols, side by side: without --protocol, all that the "
        "text allows.",
        epilog=EPILOG,
    )
    parsed.checked(_check)
    settings = parsed.settings

    from wikift.base.failure import started_world

    with started_world(settings.device) as world:
        text = open_text(settings)
        found: list[Result] = []
        try:
            for result in results(settings, text, world):
                found.append(result)
                if world.rank == 0 and settings.json:
                    print(as_json(result, found), flush=True)
        finally:  # also of what was measured before a Ctrl-C
            if world.rank == 0 and found and not settings.json:
                print(as_csv(found) if settings.csv else table(found, text.notes), flush=True)
    return EXIT_DONE


def results(settings: EvaluateSettings, text: Text, world: World) -> Iterator[Result]:
    """Everything that the settings ask for, model by model; collective. Raises UserError as `_check` does."""
    splits = text.chosen_splits(settings)
    protocols = _protocols(settings, text)
    for name in settings.models:
        with loaded_scorer(name, settings, text, world) as scorer:
            setups = [setup for protocol in protocols for setup in _setups(settings, protocol, name, scorer.positions)]
            jobs = [(split, setup) for split in splits for setup in setups]
            for number, (split, setup) in enumerate(jobs, 1):
                label = f"{name}, {split}, {setup.protocol.name} ({number} of {len(jobs)})"
                started = time.perf_counter()
                measured = measure(scorer, text, split, setup, settings, world, label)
                seconds = round(time.perf_counter() - started, 3)
                yield Result(
                    model=name,
                    text=text.name,
                    split=split,
                    protocol=setup.protocol.name,
                    normalisers=setup.protocol.normalisers,
                    context=setup.context,
                    stride=setup.stride,
                    scaled=setup.scaled,
                    measured=measured,
                    tokenizer=scorer.tokenizer.fingerprint,
                    facts={"precision": scorer.precision, "processes": world.size, "seconds": seconds},
                )


# --- what is asked for -------------------------------------------------------------------------------------------


def _check(settings: EvaluateSettings) -> None:
    """Raises UserError with every problem that shows without loading a model or reading text."""
    problems = [] if settings.models else ["MODEL: is missing; name a run (runs/NAME), a model folder or a Hub name"]
    for name in ("context", "stride", "per_device_eval_batch_size"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            problems.append(f"{flag(name)} {value}: must be 1 or more")
    if settings.context is not None and settings.stride is not None and settings.stride > settings.context:
        problems.append(
            f"--stride {settings.stride}: must be at most --context {settings.context}, or windows leave tokens out"
        )
    if settings.protocol == "lm-eval" and settings.stride is not None:
        problems.append(f"--stride {settings.stride}: cannot act, the windows of lm-eval are disjoint; leave it out")
    if settings.json and settings.csv:
        problems.append("--csv: --json is given too; leave one of the two out")
    if repeated := sorted({name for name in settings.models if settings.models.count(name) > 1}):
        problems.append(f"MODEL {repeated[0]}: is named twice; leave one out")
    checks: list[Callable[[], object]] = [lambda: check_text(settings)]
    checks += [lambda name=name: _check_model(name, settings) for name in settings.models]  # type: ignore[misc]
    for check in checks:
        try:
            check()
        except UserError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    if problems:
        raise UserError(*problems)


def _check_model(name: str, settings: EvaluateSettings) -> None:
    if not folders.has_model(name):
        raise UserError(f"{name}: has no trained model; train it first: {command_line('train')} --output-dir {name}")
    folder = Path(name) / "model" if folders.is_run(Path(name)) else Path(name)
    shape = shape_of(str(folder) if folder.is_dir() else name)
    if shape is not None and (problems := _window_problems(name, settings, shape.n_positions)):
        raise UserError(*problems)
    if folder.is_dir() and (store := check_text(settings)) is not None:
        check_tokenizer(store, folder, setting="MODEL")


def _window_problems(name: str, settings: EvaluateSettings, positions: int) -> list[str]:
    if settings.context is not None and settings.context > positions:
        return [f"--context {settings.context}: {name} has {positions} positions; take that or less"]
    if settings.context is None and settings.stride is not None and settings.stride > positions:
        return [f"--stride {settings.stride}: must be at most the context of {name}, {positions}"]
    return []


def _protocols(settings: EvaluateSettings, text: Text) -> list[Protocol]:
    name = settings.protocol
    if name is None and (settings.context is not None or settings.stride is not None):
        name = "free"
    if name is None:
        return [p for p in PROTOCOLS.values() if p.name != "free" and (p.from_store or text.corpus is not None)]
    if text.corpus is None and not PROTOCOLS[name].from_store:
        raise UserError(f"--protocol {name}: needs the text and not its tokens only; name it with --dataset "
                        f"({text.missing})")  # fmt: skip
    return [PROTOCOLS[name]]


def _setups(settings: EvaluateSettings, protocol: Protocol, name: str, positions: int) -> list[Setup]:
    """One for each of the protocol's strides, in proportion where the context is not 1,024."""
    if problems := _window_problems(name, settings, positions):  # of a model that only the Hub could tell about
        raise UserError(*problems)
    own = protocol.by_page or protocol.name == "free"  # these take the model's whole context, whatever it is
    context = settings.context or (positions if own else min(CONTEXT, positions))
    strides = {max(1, stride * context // CONTEXT): None for stride in protocol.strides}
    chosen = [settings.stride] if settings.stride is not None else list(strides)
    scaled = settings.context is None and context < CONTEXT and protocol.name != "free"
    return [Setup(protocol, context, min(stride, context), scaled) for stride in chosen]
