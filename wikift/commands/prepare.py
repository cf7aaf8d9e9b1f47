"""Text to a token store: `launch/prepare.py`, and what training calls where a store is missing.

A store that is there by the same recipe is taken at once; one by another recipe is left alone, and the user told.
Speed is 100 MB/s and more on two cores with gigatoken (`fastencode`), else that of `tokenizers`, 2 MB/s on each core
(`encode`).
"""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wikift.base.console import Progress
from wikift.base.errors import UserError
from wikift.settings.checks import check_data
from wikift.settings.fields import DataSettings, PrepareSettings, store_path
from wikift.settings.options import parse
from wikift.settings.run_plan import fallback_dataset, ranks_started

if TYPE_CHECKING:
    from wikift.data.sources import Corpus
    from wikift.data.store import Encoded, TokenStore
    from wikift.data.tokenizer import SavedTokenizer

DESCRIPTION = """\
Make a token store out of text: one flat file of ids per split, store.json, and the tokenizer.

  python launch/prepare.py --dataset wikitext-103-v1
  python launch/prepare.py --dataset my.txt --tokenizer train:8192 --out data/mine"""
DEFAULT_TOKENIZER = "gpt2"
_SLOW_BYTES = 10_000_000  # less is done before anybody wonders

Say = Callable[[str], None]


def main(argv: Sequence[str]) -> int:
    """`launch/prepare.py`."""
    started = time.perf_counter()
    settings = parse(PrepareSettings, argv, prog="prepare.py", description=DESCRIPTION)
    say: Say = (lambda text: None) if settings.quiet else (lambda text: print(text, file=sys.stderr, flush=True))
    if settings.verify and settings.dataset is None and settings.out is not None:
        return _report(_open(Path(settings.out), verify=True), settings)
    if settings.dataset is None:
        settings = dataclasses.replace(settings, dataset=fallback_dataset(ranks_started()))
        say(f"--dataset is not given: taking {settings.dataset}")
    settings = dataclasses.replace(settings, tokenizer=settings.tokenizer or DEFAULT_TOKENIZER)
    out = Path(settings.out) if settings.out is not None else store_path(settings)
    problems = source_problems(settings) + out_problems(out)
    if settings.seed < 0:
        problems.append(f"--seed {settings.seed}: must be 0 or more")
    if problems:
        raise UserError(*problems)
    there = out.is_dir() and any(out.iterdir())
    ensure_store(settings, seed=settings.seed, quiet=settings.quiet, out=out, say=say, setting="--out", started=started)
    if there:
        say(f"{out} is there already, made by the same recipe")
    return _report(_open(out, verify=settings.verify), settings)


def source_problems(settings: DataSettings) -> list[str]:
    """Every problem of dataset and tokenizer that shows without reading text, loading a tokenizer or asking the Hub."""
    from wikift.data.sources import corpus_problems
    from wikift.data.tokenizer import tokenizer_problems

    problems = check_data(settings) + corpus_problems(settings)
    if settings.tokenizer is not None:
        problems += tokenizer_problems(settings.tokenizer)
    return problems


def out_problems(out: Path) -> list[str]:
    """Whether a store may be made at (or taken from) `out`."""
    if (out / "store.json").exists():
        return []
    if out.is_symlink():
        return [f"--out {out}: is a link, which a store can't be moved to; name the folder that it is to be"]
    if out.is_dir():
        if any(out.iterdir()):
            return [f"--out {out}: is a folder with other things in it; name a new folder"]
        mount = out.resolve().is_mount()
        if mount or out.resolve() == Path.cwd():
            kind = "a mount point" if mount else "the current folder"
            return [f"--out {out}: is {kind}, which a store can't be moved to; name a folder in it"]
    elif out.exists():
        return [f"--out {out}: is a file; name a folder"]
    files = [str(above) for above in out.parents if above.is_file()]
    return [f"--out {out}: {files[0]} is a file, not a folder; name another place"] if files else []


def ensure_store(
    settings: DataSettings,
    *,
    seed: int,
    quiet: bool,
    out: Path,
    say: Say,
    setting: str = "the store",
    started: float | None = None,
) -> Path:
    """The store of the (resolved) settings at `out`: there already, made by this process, or by one that it waits for.

    Needs no process group and has no time limit, so every rank may call it. `say` gets one line at a time; the last
    tells the speed, its start-up counted from `started` (`time.perf_counter`), or else from the call. Raises UserError
    for settings and files that the user must mend, also where a store made by another recipe is at `out`, and
    EnvironmentFault for disk, network and killed workers; nothing stays behind then.
    """
    from wikift.base.publish import make_once
    from wikift.data.recipe import check_recipe, check_unchanged

    if problems := source_problems(settings) + out_problems(out):
        raise UserError(*problems)

    def is_made() -> bool:
        return (out / "store.json").exists()

    def make(folder: Path) -> None:
        first = _prepare(settings, seed, progress, folder, say)
        check_unchanged(_open(folder), settings, seed)
        seconds = time.perf_counter() - first
        size = sum(split.bytes for split in _open(folder).splits.values())
        if size > _SLOW_BYTES:
            rate = f"{size / 1e6:,.0f} MB of text in {seconds:.1f} s, {size / seconds / 1e6:,.3g} MB/s"
            say(f"{rate}, after {first - began:.1f} s of start-up")

    began = time.perf_counter() if started is None else started
    if not is_made():
        progress = Progress(quiet)
        try:
            make_once(out, make, is_made=is_made, say=say)
        finally:
            progress.clear()
    check_recipe(_open(out, setting=setting), settings, seed)
    return out


def _open(out: Path, *, verify: bool = False, setting: str = "--out") -> TokenStore:
    from wikift.data.store import open_store

    return open_store(out, verify=verify, setting=setting)


# --- the work ----------------------------------------------------------------------------------------------------


def _prepare(settings: DataSettings, seed: int, progress: Progress, folder: Path, say: Say) -> float:
    """Write the store into `folder`; gives when (`time.perf_counter`) the first text was asked for."""
    from wikift.data import encode
    from wikift.data import fast_encode as fastencode
    from wikift.data.recipe import record_of, source_of
    from wikift.data.sources import open_corpus
    from wikift.data.store import dtype_for, write_store

    if progress.quiet or not progress.terminal:
        for library in ("HF_HUB", "HF_DATASETS"):
            os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
    corpus = open_corpus(settings, seed)
    source = _beside(lambda: source_of(settings, checksums=True))
    for note in corpus.notes:
        say(note)
    tokenizer = _tokenizer(settings, corpus, folder / "tokenizer", progress, say)
    append_eos = corpus.rows_are_documents if settings.append_eos is None else settings.append_eos
    record: dict[str, Any] = {}
    times: list[float] = []

    def write(encoder: Callable[..., AbstractContextManager[encode.Encode]], cuts: encode.Cuts) -> None:
        def split_parts(split: str) -> Iterator[Encoded]:
            parts = encoded(encode.chunks(corpus.batches(split), cuts))
            counted = progress.over(split, corpus.sizes[split], parts, lambda part: (part.bytes, len(part.ids)))
            yield from _with_text(f"--dataset {settings.dataset}: its {split} split", counted)
            record.update(record_of(source(), corpus, tokenizer, append_eos, str(settings.dataset)))
            record.update(rows_cut_exactly=cuts.exact, rows_cut_inexactly=cuts.inexact)

        eos = tokenizer.eos_token_id if append_eos else None
        dtype, workers = dtype_for(tokenizer.vocab_size), settings.workers or _cores()
        with encoder(tokenizer.file, eos_token_id=eos, dtype=dtype, workers=workers) as encoded:
            times.append(time.perf_counter())
            write_store(
                folder,
                {split: split_parts(split) for split in corpus.splits},
                vocab_size=tokenizer.vocab_size,
                eos_token_id=tokenizer.eos_token_id,
                tokenizer_fingerprint=tokenizer.fingerprint,
                record=record,
            )

    cuts = encode.cut_rule(tokenizer.file)
    reason = fastencode.why_not(cuts)
    if reason is None:
        try:
            write(fastencode.fast_encoder, cuts)
        except fastencode.Disagreement as error:
            reason, cuts = str(error), encode.cut_rule(tokenizer.file)
    if reason is not None:
        progress.clear()
        if (corpus.sizes.get("train") or 0) > _SLOW_BYTES:
            say(f"{reason}: encoding with tokenizers, at about 2 MB/s on each core")
        write(encode.encoder, cuts)
    progress.clear()
    if cuts.inexact:
        say(
            f"{cuts.inexact} row(s) of more than a million characters had no place to cut at, so a few ids may differ "
            "from the tokenizer's on the whole row (rows_cut_inexactly in store.json)"
        )
    return times[0]


def _with_text(name: str, parts: Iterator[Encoded]) -> Iterator[Encoded]:
    """The parts; raises UserError at their end where there is no word in them."""
    rows = words = 0
    for part in parts:
        rows, words = rows + part.rows, words + part.words
        yield part
    if words == rows:  # each row counts one end of line
        found = f"{rows:,} blank rows" if rows else "no rows"
        raise UserError(f"{name} holds no text ({found}); name one with text in it")


def _beside(work: Callable[[], Any]) -> Callable[[], Any]:
    """Start `work` in a thread that nobody waits for at the end; gives a function that waits for what it makes."""
    made: Future[Any] = Future()

    def run() -> None:
        try:
            made.set_result(work())
        except BaseException as error:
            made.set_exception(error)

    threading.Thread(target=run, name="beside", daemon=True).start()
    return made.result


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _tokenizer(settings: DataSettings, corpus: Corpus, folder: Path, progress: Progress, say: Say) -> SavedTokenizer:
    from wikift.data import tokenizer
    from wikift.data.encode import tokenizer_threads, training_texts
    from wikift.data.tokenizer_files import EOS

    name = str(settings.tokenizer)
    if not name.startswith("train:"):
        return tokenizer.load(name, folder)
    if "train" not in corpus.splits:
        raise UserError(f"--tokenizer {name}: {settings.dataset} has no train split to train on; name a tokenizer")
    size = int(name.removeprefix("train:"))
    say(f"training a byte-level BPE of {size:,} tokens on the train split")
    texts = training_texts(corpus.texts("train"), EOS)
    with tokenizer_threads(True):
        counted = progress.over("tokenizer", corpus.sizes["train"], texts, lambda text: (len(text.encode()), 0))
        saved = tokenizer.train(counted, size, folder)
    progress.clear()
    if saved.vocab_size < size:
        say(f"the text has too few different pairs for {size:,} tokens: the vocabulary has {saved.vocab_size:,}")
    return saved


# --- what is shown -----------------------------------------------------------------------------------------------


def _report(store: TokenStore, settings: PrepareSettings) -> int:
    rows = [("split", "rows", "tokens", "words", "bytes")]
    for name, split in store.splits.items():
        rows.append((name, f"{split.rows:,}", f"{split.tokens:,}", f"{split.words:,}", f"{split.bytes:,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    show: Say = (lambda text: None) if settings.quiet else print
    for row in rows:
        cells = (f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        show("  ".join((f"{row[0]:<{widths[0]}}", *cells)))
    show(f"{store.path}: {'every byte is as it was written' if settings.verify else 'ready'}. Next:")
    show(f"  python launch/train.py --data {store.path}")
    return 0
