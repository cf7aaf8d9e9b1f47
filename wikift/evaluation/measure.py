"""One model's likelihood of one text by one protocol: the model, the ids and the sums put together."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from wikift.base.console import Progress
from wikift.base.errors import UserError
from wikift.evaluation.documents import Counts
from wikift.evaluation.protocols import Piece, Protocol, encoded, protocol_windows, stored
from wikift.evaluation.score import Measured, score_windows
from wikift.evaluation.text import Text
from wikift.export.export import model_source
from wikift.settings.fields import EvaluateSettings

if TYPE_CHECKING:
    from torch import Tensor

    from wikift.base.world import World
    from wikift.data.tokenizer import SavedTokenizer


@dataclass(frozen=True)
class Setup:
    """One protocol for one model. `scaled`: the model is too small for the protocol's windows."""

    protocol: Protocol
    context: int
    stride: int
    scaled: bool


@dataclass(frozen=True)
class Scorer:
    """A loaded model as the function that `score_windows` takes, and its tokenizer."""

    losses: Callable[[Tensor, Tensor], Tensor]
    positions: int
    precision: str
    tokenizer: SavedTokenizer


@contextmanager
def loaded_scorer(name: str, settings: EvaluateSettings, text: Text, world: World) -> Iterator[Scorer]:
    """Load one model, and its tokenizer into a folder that goes at the end; collective."""
    import torch
    from transformers.utils import logging as transformers_logging

    from wikift.data import tokenizer
    from wikift.model.gpt2 import NextTokenLoss, load_model, resolve_precision

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()

    def say(line: str) -> None:
        if world.rank == 0 and not settings.quiet:
            print(f"wikift: {line}", file=sys.stderr, flush=True)

    if world.rank == 0:  # a run is exported by one process
        model_source(name, say)
    world.barrier()
    source = model_source(name, lambda line: None)
    model = load_model(source, world.device, "MODEL", say)
    if Path(source).is_dir():
        tokenizer.tokenizer_fingerprint(source, setting="MODEL")  # says what is wrong with it, in the user's words
    precision = resolve_precision(settings.precision, world.device)
    if precision.warning:
        say(precision.warning)
    losses = NextTokenLoss(model, precision.name)

    def scored(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.inference_mode():
            return losses.by_token(inputs.to(world.device), targets.to(world.device))

    with tempfile.TemporaryDirectory(prefix="wikift-tokenizer-") as folder:
        saved = tokenizer.load(source, Path(folder))
        if text.store is not None and saved.fingerprint != text.store.tokenizer_fingerprint:
            raise UserError(
                f"MODEL {name}: its tokenizer is not the one that made {text.store.path}; name the text with --dataset"
            )
        yield Scorer(scored, model.config.n_positions, precision.name, saved)


def measure(
    scorer: Scorer, text: Text, split: str, setup: Setup, settings: EvaluateSettings, world: World, label: str
) -> Measured:
    """One model, one split, one protocol; collective. Raises UserError where there is nothing to score."""
    protocol, counts, tokens = setup.protocol, Counts(), [0]
    from_store = text.store is not None and protocol.from_store

    def counted(source: Iterator[Piece]) -> Iterator[Piece]:
        for piece in source:
            tokens.extend([0] * (piece.document + 1 - len(tokens)))
            tokens[piece.document] += len(piece.ids)
            yield piece

    if text.store is not None and from_store:
        source, size = stored(text.store, split), text.store.splits[split].tokens
    else:
        assert text.corpus is not None
        eos = scorer.tokenizer.eos_token_id if protocol.from_store and text.corpus.rows_are_documents else None
        source = encoded(protocol.texts(text.corpus, split, counts), scorer.tokenizer.file, eos)
        size = text.corpus.sizes[split] or 0
    windows = protocol_windows(
        protocol,
        counted(source),
        context=setup.context,
        stride=setup.stride,
        eos_token_id=scorer.tokenizer.eos_token_id,
    )
    tell = _progress(label, settings.quiet or world.rank != 0)
    try:
        nll, scored = score_windows(
            scorer.losses,
            windows,
            batch=settings.per_device_eval_batch_size,
            world=world,
            progress=lambda: tell((sum(tokens) if from_store else counts.bytes_read) / size if size else 0.0),
        )
    finally:
        tell(None)
    if not scored.sum():
        raise UserError(f"--split {split}: {text.name} has no token to predict in it; take another")
    lengths = np.array(tokens, np.float64)
    if text.store is not None and from_store:  # which words are whose, tokens don't tell: in proportion
        found = text.store.splits[split]
        words, size_bytes = (lengths * (total / lengths.sum()) for total in (found.words, found.bytes))
    else:
        words, size_bytes = np.array(counts.words, np.float64), np.array(counts.bytes, np.float64)
    documents = max(len(lengths), len(words))
    return Measured(*(_of_length(part, documents) for part in (nll, scored, lengths, words, size_bytes)))


def _of_length(part: np.ndarray, length: int) -> np.ndarray:
    return np.pad(part[:length], (0, max(0, length - len(part))))


def _progress(label: str, quiet: bool) -> Callable[[float | None], None]:
    """How far one protocol is and how long it will take: a line on a terminal, elsewhere one every ten seconds."""
    progress, started = Progress(quiet), time.monotonic()
    shown = started

    def tell(part: float | None) -> None:
        nonlocal shown
        now = time.monotonic()
        if part is None:
            progress.clear()
        elif now - shown >= progress.pause_seconds:
            shown = now
            left = (now - started) * (1 - part) / part if 0 < part < 1 else 0.0
            words = f"{left / 60:.0f} min" if left >= 90 else f"{left:.0f} s"
            progress.show(f"{label}: {min(part, 1):.0%}, {words} left" if part else f"{label}: reading")

    return tell
