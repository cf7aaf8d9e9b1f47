"""The text of an evaluation, and its ids: a token store, the rows it was made of, or a dataset."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wikift.base.errors import EnvironmentFault, UserError, one_line
from wikift.data.corpus import Corpus
from wikift.data.encode import pieces, plain_tokenizer, splits_at_spaces
from wikift.data.recipe import open_again
from wikift.data.sources import Source, open_source
from wikift.data.store import TokenStore
from wikift.evaluation.documents import Part
from wikift.evaluation.score import Piece

ALL = "all"  # the split of a single file
_WITH_UNK = ("wikitext-2-v1", "wikitext-103-v1")
_STRETCH_TOKENS = 1024


@dataclass(frozen=True)
class Text:
    """`store` where there is one; `corpus` where the rows can be read, else `missing` says why; notes for the user."""

    name: str
    store: TokenStore | None
    corpus: Corpus | None
    missing: str
    notes: list[str]

    def splits(self) -> list[str]:
        """The splits that can be evaluated, as far as that is known."""
        if self.store is not None:
            return splits_of(self.store)
        return list(self.corpus.splits) if self.corpus is not None else []


def splits_of(store: TokenStore) -> list[str]:
    """The splits with a token that others precede."""
    return [name for name, split in store.splits.items() if split.tokens > 1]


def text_of_dataset(source: Source) -> Text:
    """A text without a store: as prepare's, but for a single file, which is one split."""
    corpus = open_source(source, cut=not Path(source.dataset).is_file())
    if list(corpus.splits) == ["train"]:
        corpus = dataclasses.replace(corpus, splits={ALL: corpus.splits["train"]}, sizes={ALL: corpus.sizes["train"]})
    name = f"{corpus.name} {corpus.config}" if corpus.config else corpus.name
    return Text(name, None, corpus, "", _notes(corpus.config))


def text_of_store(store: TokenStore) -> Text:
    """A store's text, with the rows that it was made of where they can be read again."""
    name = str(store.path)
    try:
        corpus = open_again(store)
    except (UserError, EnvironmentFault, OSError, KeyError) as error:
        missing = one_line(error)
        note = f"hf-doc, paper and lm-eval need the text that {name} was made of; name it with --dataset ({missing})"
        return Text(name, store, None, missing, [note, *_notes(store.record.get("dataset_config"))])
    return Text(name, store, corpus, "", _notes(corpus.config))


def _notes(config: str | None) -> list[str]:
    if config not in _WITH_UNK:
        return []
    raw = config.replace("-v1", "-raw-v1")
    return [f"{config} has <unk> for rare words; published GPT-2 numbers are of {raw} mostly"]


def encoded(texts: Iterable[Part], tokenizer_file: Path, eos_token_id: int | None) -> Iterator[Piece]:
    """The ids of each unit, as the tokenizer returns them for all of it; `eos_token_id` follows unless None."""
    tokenizer = plain_tokenizer(tokenizer_file)
    unread: list[np.ndarray] = []  # the document of each character that is not encoded yet
    document = 0

    def noted() -> Iterator[tuple[str, bool]]:
        nonlocal document
        for text, ends, document in texts:
            unread.append(np.full(len(text), document))
            yield text, ends

    for text, ends in pieces(noted(), cut=splits_at_spaces(tokenizer_file)):
        of_characters = np.concatenate(unread)
        unread[:] = [of_characters[len(text) :]]
        encoding = tokenizer.encode(text, add_special_tokens=False)
        ids, documents = encoding.ids, [of_characters[min(begin, len(text) - 1)] for begin, _ in encoding.offsets]
        if ends and eos_token_id not in (None, *ids[-1:]):
            ids, documents = [*ids, eos_token_id], [*documents, document]
        yield Piece(np.array(ids, np.int64), np.array(documents, np.int64), ends)


def document_starts(store: TokenStore, split: str) -> list[int]:
    """Where documents but the first begin: after end-of-text tokens where rows have them.

    A text without counts as documents of 1,024 tokens, so that a difference has a standard error.
    """
    ids = store.tokens(split)
    ends = np.flatnonzero(ids[:-1] == store.eos_token_id) if store.record.get("append_eos") else np.empty(0, np.int64)
    return (ends + 1).tolist() or list(range(_STRETCH_TOKENS, len(ids), _STRETCH_TOKENS))
