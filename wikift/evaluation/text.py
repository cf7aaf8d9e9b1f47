"""The text that an evaluation is about: a token store, the rows it was made of, or a dataset without a store."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from wikift.base import folders
from wikift.base.errors import EnvironmentFault, UserError
from wikift.base.hub import one_line
from wikift.data.corpus import Corpus
from wikift.data.recipe import open_again
from wikift.data.sources import Source, open_source, source_problems
from wikift.data.store import TokenStore, open_store
from wikift.settings.fields import DataSettings, EvaluateSettings
from wikift.settings.run_plan import check_data

WHOLE = "all"  # the split of a single file
_WITH_UNK = ("wikitext-2-v1", "wikitext-103-v1")


@dataclass(frozen=True)
class Text:
    """`store` where one is named or a run knows one; `corpus` where the rows are to be had, else `missing` says why."""

    name: str
    store: TokenStore | None
    corpus: Corpus | None
    missing: str
    notes: list[str]

    def chosen_splits(self, settings: EvaluateSettings) -> list[str]:
        """The split asked for, or all but train where there are others. Raises UserError for one that is not there."""
        if self.store is not None:
            there = [name for name, split in self.store.splits.items() if split.tokens > 1 or name == settings.split]
        else:
            there = list(self.corpus.splits) if self.corpus is not None else []
        if settings.split is not None:
            if settings.split not in there:
                raise UserError(f"--split {settings.split}: {self.name} has {', '.join(there)}; take one of these")
            return [settings.split]
        if not there:
            raise UserError(f"--split: {self.name} has no token to predict in any; name another text")
        return [name for name in there if name != "train"] or there


def check_text(settings: EvaluateSettings) -> TokenStore | None:
    """The store that the settings lead to, None with `--dataset`. Raises UserError for every problem with either."""
    if settings.dataset is not None:
        data = _data_settings(settings)
        problems = check_data(data) + source_problems(_source(settings))
        if settings.data is not None:
            problems.append(f"--data {settings.data}: cannot act, --dataset {settings.dataset} is given; leave one out")
        if problems:
            raise UserError(*problems)
        return None
    for name in ("dataset_config", "text_column"):
        if getattr(settings, name) != getattr(EvaluateSettings(), name):
            raise UserError(f"--{name.replace('_', '-')} {getattr(settings, name)}: cannot act without --dataset")
    if settings.data is not None:
        return _with_split(open_store(settings.data), settings)
    stores = []
    for model in settings.models:
        run = folders.run_of(model)
        if run is not None:
            stores.append(open_store(str(folders.run_config(run)["store_path"])))
    if not stores and settings.models:
        raise UserError(
            f"--data: is missing, {settings.models[0]} is no run that would know its store; name one of "
            "launch/prepare.py, or a text with --dataset"
        )
    if len({store.fingerprint for store in stores}) > 1:
        raise UserError("--data: is missing, the runs were trained on different stores; name one for all of them")
    return _with_split(stores[0], settings) if stores else None


def _with_split(store: TokenStore, settings: EvaluateSettings) -> TokenStore:
    split = settings.split
    if split is not None and split not in store.splits:
        raise UserError(f"--split {split}: {store.path} has {', '.join(store.splits)}; take one of these")
    if split is not None and store.splits[split].tokens < 2:
        raise UserError(f"--split {split}: {store.path} has no token to predict in it; take another")
    return store


def open_text(settings: EvaluateSettings) -> Text:
    """The text of (checked) settings, with notes for the reader of its numbers."""
    store, corpus, missing = check_text(settings), None, ""
    if store is None:
        corpus = _named(settings)
        name = f"{corpus.name} {corpus.config}" if corpus.config else corpus.name
    else:
        name = str(store.path)
        try:
            corpus = open_again(store)
        except (UserError, EnvironmentFault, OSError, KeyError) as error:
            missing = one_line(error)
    notes = []
    if missing:
        notes.append(
            f"hf-doc, paper and lm-eval need the text, which {name} does not lead to: name it with --dataset "
            f"({missing})"
        )
    config = corpus.config if corpus is not None else store.record.get("dataset_config") if store is not None else None
    if config in _WITH_UNK:
        raw = str(config).replace("-v1", "-raw-v1")
        notes.append(f"{config} has <unk> for rare words; published GPT-2 numbers are of {raw} mostly")
    return Text(name, store, corpus, missing, notes)


def _data_settings(settings: EvaluateSettings) -> DataSettings:
    return DataSettings(
        dataset=settings.dataset, dataset_config=settings.dataset_config, text_column=settings.text_column
    )


def _source(settings: EvaluateSettings) -> Source:
    return Source(str(settings.dataset), settings.dataset_config, settings.text_column)


def _named(settings: EvaluateSettings) -> Corpus:
    """The corpus of `--dataset`: as prepare's, save that a single file is one split, the whole of it."""
    if not Path(str(settings.dataset)).is_file():
        return open_source(_source(settings))
    corpus = open_source(_source(settings), cut=False)
    return dataclasses.replace(corpus, splits={WHOLE: corpus.splits["train"]}, sizes={WHOLE: corpus.sizes["train"]})
