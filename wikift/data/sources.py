"""A dataset's name or path -> batches of rows: WikiText and others of the Hub, the user's files, the demo.

Each call of a split reads it again from the start, in bounded memory. Where there is a train split and no validation
split, a part of the train rows is cut off: of documents single rows, of line files whole stretches of lines, since
neighbouring lines in both splits would leak. How many are cut is exact; which ones is a function of the seed, the
number of rows and the fraction. It costs one more reading, to count. Nothing here knows a tokenizer.
"""

from __future__ import annotations

import dataclasses
import math
import platform
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wikift.base import hub
from wikift.base.errors import EnvironmentFault, UserError
from wikift.data.readers import READERS, parquet_bytes, parquet_problems, rows_at_once
from wikift.data.texts import Texts
from wikift.data.user_files import CHANGED, SPLITS, UserFiles, user_files
from wikift.settings.fields import WIKITEXT, DataSettings

DEFAULT_VALIDATION_FRACTION = 0.05
_STRETCHES = 10  # of lines, at least, on the smaller side of a cut: a sample of the text and not one chapter of it

Rows = Callable[[], Iterator[Texts]]
Ends = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Corpus:
    """Splits of rows. `sizes` are bytes of text, about, where they are known beforehand; `notes` are for the user.

    Where `rows_are_lines`, a row may come in several texts and ends where a text ends in "\\n" (or the split does);
    elsewhere each text is a row.
    """

    name: str
    config: str | None
    revision: str
    rows_are_documents: bool
    rows_are_lines: bool
    splits: dict[str, Rows]
    sizes: dict[str, int | None]
    cut: dict[str, float | int] | None = None
    notes: list[str] = field(default_factory=list)

    def batches(self, split: str) -> Iterator[tuple[Texts, Ends]]:
        """The texts of `split` in order, and which of them end their row; the last one does."""
        held: Texts | None = None
        for batch in self.splits[split]():
            if not len(batch):
                continue
            if held is not None:
                yield held, self._ends(held)
            held = batch
        if held is not None:
            ends = self._ends(held)
            ends[-1] = True
            yield held, ends

    def _ends(self, texts: Texts) -> Ends:
        return texts.ends_with(ord("\n")) if self.rows_are_lines else np.ones(len(texts), np.bool_)

    def texts(self, split: str) -> Iterator[tuple[str, bool]]:
        """Each text of `split` in order as a string, and whether its row ends with it."""
        for texts, ends in self.batches(split):
            yield from zip(texts, ends.tolist(), strict=True)


def open_corpus(settings: DataSettings, seed: int, *, cut: bool = True) -> Corpus:
    """The corpus that the (resolved) settings name, its splits in the order train, validation, test, others.

    `cut`: whether a missing validation split is cut from train.

    Raises UserError for what the user can mend, EnvironmentFault where the Hub is out of reach.
    """
    assert settings.dataset is not None
    if settings.dataset == "demo":
        corpus = _demo()
    elif settings.dataset in WIKITEXT:
        corpus = _from_hub(settings, "Salesforce/wikitext", settings.dataset)
    elif (files := user_files(settings)) is not None:
        corpus = _from_files(settings, files)
    else:
        corpus = _from_hub(settings, settings.dataset, settings.dataset_config)
    if cut and "train" in corpus.splits and "validation" not in corpus.splits:
        corpus = _cut_validation(corpus, settings.validation_fraction or DEFAULT_VALIDATION_FRACTION, seed)
    elif settings.validation_fraction is not None:
        raise UserError(idle_fraction(settings, "validation" in corpus.splits))
    order = sorted(corpus.splits, key=lambda name: SPLITS.index(name) if name in SPLITS else len(SPLITS))
    return dataclasses.replace(corpus, splits={name: corpus.splits[name] for name in order})


def idle_fraction(settings: DataSettings, validation: bool) -> str:
    """The problem of a `--validation-fraction` where nothing is cut."""
    given = f"--validation-fraction {settings.validation_fraction:g}"
    has = "a validation split of its own" if validation else "no train split to cut"
    return f"{given}: cannot act, {settings.dataset} has {has}; leave it out"


def corpus_problems(settings: DataSettings) -> list[str]:
    """What is wrong with the dataset settings as far as it shows without reading text or asking the Hub."""
    if settings.dataset is None or settings.dataset in WIKITEXT:
        return []
    problems, splits, plain = [], set(SPLITS), settings.dataset == "demo"
    if not plain:
        try:
            files = user_files(settings)
        except UserError as error:
            return list(error.problems)
        if files is None:
            return []
        splits, plain = set(files.splits), files.suffix == ".txt"
    if settings.validation_fraction is not None and ("validation" in splits or "train" not in splits):
        problems.append(idle_fraction(settings, "validation" in splits))
    if plain and settings.text_column != "text":
        problems.append(
            f"--text-column {settings.text_column}: cannot act, {settings.dataset} has no columns; leave it out"
        )
    return problems


# --- the user's files --------------------------------------------------------------------------------------------


def _from_files(settings: DataSettings, files: UserFiles) -> Corpus:
    column, lines = settings.text_column, files.suffix == ".txt"
    if files.suffix == ".parquet":  # found at once and not after minutes
        problems = [p for paths in files.splits.values() for path in paths for p in parquet_problems(path, column)]
        if problems:
            raise UserError(*problems)

    def rows(paths: list[Path]) -> Rows:
        def batches() -> Iterator[Texts]:
            open_line = False
            for path in paths:
                if open_line:
                    open_line = False
                    yield Texts.of(["\n"])  # a line ends with its file, also if another file follows
                for batch in READERS[files.suffix](path, column):
                    yield batch
                    open_line = lines and not batch.ends_with(ord("\n"))[-1]

        return batches

    def size(paths: list[Path]) -> int:
        return sum(parquet_bytes(p, column) if files.suffix == ".parquet" else p.stat().st_size for p in paths)

    return Corpus(
        name=Path(settings.dataset or "").resolve().name,
        config=files.config,
        revision="",  # of files the recipe has the content's checksum
        rows_are_documents=files.rows_are_documents,
        rows_are_lines=lines,
        splits={name: rows(paths) for name, paths in files.splits.items()},
        sizes={name: size(paths) for name, paths in files.splits.items()},
    )


# --- the Hub -----------------------------------------------------------------------------------------------------


def _from_hub(settings: DataSettings, name: str, config: str | None) -> Corpus:
    setting, column = f"--dataset {settings.dataset}", settings.text_column
    hub.offline_if_unreachable()
    import datasets

    hub.quiet_libraries()
    try:
        loaded = datasets.load_dataset(name, config)
    except Exception as error:
        if type(error) is ValueError and "find cache" not in str(error):  # which configurations there are, it says
            given = config if config is not None else "must be given"
            raise UserError(f"--dataset-config {given}: {hub.one_line(error, 400)}") from None
        raise hub.failure(error, setting, "a file or folder of your own") from None
    first = next(iter(loaded.values()))
    if getattr(first.features.get(column), "dtype", None) not in ("string", "large_string"):
        has = ", ".join(f"{name} ({getattr(kind, 'dtype', 'nested')})" for name, kind in first.features.items())
        raise UserError(f"--text-column {column}: {settings.dataset} has no such column of text; it has {has}")

    def rows(part: Any) -> Rows:
        def batches() -> Iterator[Texts]:
            number, text = 0, part.select_columns([column]).with_format("arrow")
            for table in text.iter(batch_size=rows_at_once(len(text), text.data.nbytes)):
                texts = table.column(0)
                if texts.null_count:
                    null = texts.is_null().index(True).as_py()
                    raise UserError(f"{setting}: row {number + null + 1} of {column!r} is null, not text")
                number += len(texts)
                yield Texts.of_arrow(texts)

        return batches

    info, config = first.info, first.info.config_name or config
    sources = [*(info.download_checksums or {}), *(file["filename"] for file in first.cache_files)]
    commit = re.search(r"[@/]([0-9a-f]{40})/", "\n".join(map(str, sources)))
    return Corpus(
        name=name,
        config=config,
        revision=commit[1] if commit else str(info.version),
        rows_are_documents=config not in WIKITEXT,
        rows_are_lines=False,
        splits={str(split): rows(part) for split, part in loaded.items()},
        sizes={str(split): getattr((info.splits or {}).get(split), "num_bytes", None) for split in loaded},
    )


# --- the demo ----------------------------------------------------------------------------------------------------


def _demo() -> Corpus:
    """The topic texts of `pydoc_data.topics`, which every Python carries (465 KB), 90/5/5 by topic.

    The longest first, each topic goes to the split that is furthest below its share, so the shares hold by bytes.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise EnvironmentFault(
            "--dataset demo: this Python lacks pydoc_data; install its whole standard library, or name a .txt file"
        ) from None
    shares = {"train": 0.9, "validation": 0.05, "test": 0.05}
    texts: dict[str, list[str]] = {split: [] for split in shares}
    sizes = dict.fromkeys(shares, 0)
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        text = topics[name].removesuffix("\n")
        total = sum(sizes.values()) + len(text.encode()) + 1
        split = max(shares, key=lambda split: shares[split] * total - sizes[split])
        sizes[split] += len(text.encode()) + 1
        texts[split].append(text)

    def rows(split: str) -> Rows:
        return lambda: (Texts.of(line + "\n" for line in text.split("\n")) for text in texts[split])

    return Corpus("demo", None, platform.python_version(), False, True, {s: rows(s) for s in shares}, dict(sizes))


# --- the cut -----------------------------------------------------------------------------------------------------


def _cut_validation(corpus: Corpus, fraction: float, seed: int) -> Corpus:
    """Cut `fraction` of the train rows off as validation. One row stays whole; of two or more neither side is empty."""
    train = corpus.splits["train"]
    rows = sum(int(ends.sum()) for _, ends in corpus.batches("train"))
    if rows < 2:
        note = f"{corpus.name} has {'one row' if rows else 'no rows'}, so no validation split is cut from it"
        return dataclasses.replace(corpus, notes=[*corpus.notes, note])
    units = min(rows, math.ceil(_STRETCHES / min(fraction, 1 - fraction))) if corpus.rows_are_lines else rows

    def part(validation: bool) -> Rows:
        def batches() -> Iterator[Texts]:
            chosen = _chosen(units, fraction, seed)
            first = row = 0  # the unit that `taken` starts with; the row that comes next
            taken = np.fromiter(islice(chosen, 1), np.bool_)
            for batch in train():
                if not len(batch):
                    continue
                ends = batch.ends_with(ord("\n")) if corpus.rows_are_lines else np.ones(len(batch), np.bool_)
                ended = np.cumsum(ends)
                of_text = (row + ended - ends) * units // rows
                row += int(ended[-1])
                if row > rows:
                    raise UserError(f"{corpus.name}: {CHANGED}")
                more = np.fromiter(islice(chosen, int(of_text[-1]) + 1 - first - len(taken)), np.bool_)
                taken, first = np.concatenate((taken, more))[of_text[0] - first :], int(of_text[0])
                kept = batch.kept(taken[of_text - first] == validation)
                if len(kept):
                    yield kept

        return batches

    size = corpus.sizes["train"]
    parts = {"train": 1 - fraction, "validation": fraction}
    return dataclasses.replace(
        corpus,
        splits={**corpus.splits, "train": part(False), "validation": part(True)},
        sizes={**corpus.sizes, **{name: None if size is None else int(size * share) for name, share in parts.items()}},
        cut={"validation_fraction": fraction, "seed": seed},
    )


def _chosen(units: int, fraction: float, seed: int) -> Iterator[bool]:
    """For each of `units` whether it is cut off: `fraction` of them, at least one, not all.

    Selection sampling (Knuth, TAOCP 2, 3.4.2, algorithm S): exact, one pass, no memory.
    """
    left = min(max(1, round(units * fraction)), units - 1)
    source = random.Random(seed)
    for remaining in range(units, 0, -1):
        take = source.random() * remaining < left
        left -= take
        yield take
