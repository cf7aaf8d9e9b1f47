"""A dataset's name or path -> rows: WikiText and others of the Hub, the user's files, the demo. Knows no tokenizer."""

from __future__ import annotations

import dataclasses
import functools
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from wikift.base import hub
from wikift.base.errors import EnvironmentFault, UserError
from wikift.base.names import CUT_SEED, WIKITEXT
from wikift.data.corpus import Corpus, Rows, cut_validation
from wikift.data.dataset_card import choose, configs_of
from wikift.data.readers import read_rows
from wikift.data.splits import SPLITS, Candidate
from wikift.data.tables import TABLES, table_sizes
from wikift.data.texts import Texts
from wikift.data.user_files import UserFiles, user_files

DEFAULT_VALIDATION_FRACTION = 0.05


@dataclass(frozen=True)
class Source:
    """Which text: a dataset's name or path (`more`: further ones), and how validation is cut where there is none."""

    dataset: str
    config: str | None = None
    text_column: str = "text"
    validation_fraction: float | None = None
    seed: int = CUT_SEED
    encoding: str | None = None
    more: tuple[str, ...] = ()
    revision: str | None = None  # branch, tag or commit of a dataset of the Hub

    @property
    def name(self) -> str:
        """Of the user's files, without the folders above them."""
        return ", ".join(Path(each).resolve().name for each in (self.dataset, *self.more))

    @functools.cached_property
    def files(self) -> UserFiles | None:
        """The user's files that it names; None for WikiText, the demo and names of the Hub. Raises UserError."""
        known = not self.more and (self.dataset == "demo" or self.dataset in WIKITEXT)
        return None if known else user_files((self.dataset, *self.more), self.config)


def open_source(source: Source, *, cut: bool = True) -> Corpus:
    """The rows of `source`, its splits in the order train, validation, test, others.

    `cut`: whether a missing validation split is cut from train.

    Raises UserError for what the user can fix, EnvironmentFault where the Hub is out of reach.
    """
    if source.dataset == "demo":
        corpus = _demo()
    elif source.dataset in WIKITEXT:
        corpus = _from_hub(source, "Salesforce/wikitext", source.dataset)
    elif (files := source.files) is not None:
        corpus = _from_files(source, files)
    else:
        corpus = _from_hub(source, source.dataset, source.config)
    if cut and "train" in corpus.splits and "validation" not in corpus.splits:
        corpus = cut_validation(corpus, source.validation_fraction or DEFAULT_VALIDATION_FRACTION, source.seed)
    elif source.validation_fraction is not None:
        raise UserError(unused_fraction(source, "validation" in corpus.splits))
    order = sorted(corpus.splits, key=lambda name: SPLITS.index(name) if name in SPLITS else len(SPLITS))
    return dataclasses.replace(corpus, splits={name: corpus.splits[name] for name in order})


def unused_fraction(source: Source, validation: bool) -> str:
    has = "a validation split of its own" if validation else "no train split to cut"
    return f"--validation-fraction {source.validation_fraction:g}: has no effect, {source.dataset} has {has}; omit it"


def source_problems(source: Source) -> list[str]:
    """What is wrong with `source` as far as it shows without reading text or asking the Hub."""
    try:
        files = source.files
    except UserError as error:
        return list(error.problems)
    problems, dataset = [], source.dataset
    kind = files.kind if files is not None else "demo" if dataset == "demo" else "Hub"
    splits = files.splits if files is not None else SPLITS if kind == "demo" else ()
    if source.validation_fraction is not None and splits and ("validation" in splits or "train" not in splits):
        problems.append(unused_fraction(source, "validation" in splits))
    if kind in ("demo", "lines") and source.text_column != "text":
        problems.append(f"--text-column {source.text_column}: has no effect, {dataset} has no columns; omit it")
    if source.revision is not None and kind != "Hub":
        problems.append(f"--dataset-revision {source.revision}: has no effect, {dataset} is not of the Hub; omit it")
    if source.encoding is not None and kind in ("demo", "Hub", *TABLES):
        problems.append(f"--encoding {source.encoding}: has no effect, {dataset} is not a text file; omit it")
    return problems


# --- the user's files --------------------------------------------------------------------------------------------


def _from_files(source: Source, files: UserFiles) -> Corpus:
    column, notes = source.text_column, files.notes()
    long_line = f"{source.dataset}: lines of more than a million characters are divided into several rows"

    def rows(of_split: list[Candidate]) -> Rows:
        def batches() -> Iterator[Texts]:
            last: Texts | None = None
            for batch in read_rows([each.file for each in of_split], files.kind, column, source.encoding):
                yield batch
                if last is not None and files.kind == "lines" and not last.ends_with_newline and long_line not in notes:
                    notes.append(long_line)
                last = batch

        return batches

    every = [each.file for of_split in files.splits.values() for each in of_split]
    tables = [file for file in every if file.in_place] if files.kind in TABLES else []
    known = dict(zip(tables, table_sizes(tables, column), strict=True))  # problems at once and not after minutes

    def size(of_split: list[Candidate]) -> int | None:
        sizes = [known.get(each.file, each.file.size) for each in of_split]
        return None if None in sizes else sum(filter(None, sizes))

    return Corpus(
        name=source.name,
        config=files.config,
        revision="",  # of files the recipe has the content's checksum
        rows_are_documents=files.rows_are_documents,
        splits={name: rows(each) for name, each in files.splits.items()},
        sizes={name: size(each) for name, each in files.splits.items()},
        notes=notes,
    )


# --- the Hub -----------------------------------------------------------------------------------------------------


def _from_hub(source: Source, name: str, config: str | None) -> Corpus:
    repository = f"{name}@{source.revision}" if source.revision else name
    folder = hub.fetch(repository, "--dataset", ("README.md",), "dataset")
    wanted: tuple[str, ...] = ("*",)
    if configs := configs_of(folder / "README.md"):
        wanted = tuple(p for patterns in choose(configs, config)[1].values() for p in patterns)
    folder = hub.fetch(repository, "--dataset", wanted, "dataset")
    try:
        files = user_files([str(folder)], config)
        assert files is not None
        corpus = _from_files(source, files)
    except UserError as error:  # in the user's terms
        raise UserError(*(problem.replace(str(folder), name) for problem in error.problems)) from None
    return dataclasses.replace(corpus, name=name, revision=folder.name)


# --- the demo ----------------------------------------------------------------------------------------------------


def _demo() -> Corpus:
    """The topic texts of `pydoc_data.topics`, which every Python carries (465 KB), 90/5/5 by topic.

    The longest first, each topic goes to the split that is furthest below its share, so the shares hold by bytes.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise EnvironmentFault(
            "--dataset demo: this Python has no pydoc_data; install its full standard library, or name a .txt file"
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

    return Corpus("demo", None, platform.python_version(), False, {s: rows(s) for s in shares}, dict(sizes))
