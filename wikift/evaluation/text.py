"""The text that an evaluation is about, and its ids: a token store, the rows it was made of, or a dataset."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wikift.base.errors import EnvironmentFault, UserError
from wikift.base.hub import one_line
from wikift.data.corpus import Corpus
from wikift.data.cuts import cut_rule, pieces
from wikift.data.encode import plain_tokenizer
from wikift.data.recipe import open_again
from wikift.data.sources import Source, open_source
from wikift.data.store import TokenStore
from wikift.evaluation.detokenize import Part
from wikift.evaluation.documents import is_title
from wikift.evaluation.score import Piece

ALL = "all"  # the split of a single file
_WITH_UNK = ("wikitext-2-v1", "wikitext-103-v1")
_ENCODED_TOGETHER = 1 << 16  # characters
_TITLE_TOKENS = 400


@dataclass(frozen=True)
class Text:
    """`store` where there is one; `corpus` where the rows can be read, else `missing` says why; notes for the user."""

    name: str
    store: TokenStore | None
    corpus: Corpus | None
    missing: str
    notes: list[str]

    def splits(self) -> list[str]:
        """The splits with a token to predict, as far as that is known."""
        if self.store is not None:
            return [name for name, split in self.store.splits.items() if split.tokens > 1]
        return list(self.corpus.splits) if self.corpus is not None else []


def text_of_dataset(source: Source) -> Text:
    """A text without a store: as prepare's, save that a single file is one split, all of it."""
    file = Path(source.dataset).is_file()
    corpus = open_source(source, cut=not file)
    if file:
        corpus = dataclasses.replace(corpus, splits={ALL: corpus.splits["train"]}, sizes={ALL: corpus.sizes["train"]})
    name = f"{corpus.name} {corpus.config}" if corpus.config else corpus.name
    return Text(name, None, corpus, "", _notes(corpus.config))


def text_of_store(store: TokenStore) -> Text:
    """A store's text, with the rows that it was made of where they can be had."""
    name = str(store.path)
    try:
        corpus = open_again(store)
    except (UserError, EnvironmentFault, OSError, KeyError) as error:
        missing = one_line(error)
        need = "hf-doc, paper and lm-eval need the text, which"
        note = f"{need} {name} does not lead to: name it with --dataset ({missing})"
        return Text(name, store, None, missing, [note, *_notes(store.record.get("dataset_config"))])
    return Text(name, store, corpus, "", _notes(corpus.config))


def _notes(config: str | None) -> list[str]:
    if config not in _WITH_UNK:
        return []
    raw = config.replace("-v1", "-raw-v1")
    return [f"{config} has <unk> for rare words; published GPT-2 numbers are of {raw} mostly"]


# --- an adapter, until data has Source, open_source, source_problems and open_again ------------------------------


# --- text to ids -------------------------------------------------------------------------------------------------


def encoded(texts: Iterable[Part], tokenizer_file: Path, eos_token_id: int | None) -> Iterator[Piece]:
    """The ids of each unit, as the tokenizer returns them for all of it; `eos_token_id` follows unless None."""
    tokenizer = plain_tokenizer(tokenizer_file)
    starts: list[int] = []  # in characters, of documents that are not encoded yet, and their numbers
    numbers: list[int] = []

    def without_documents() -> Iterator[tuple[str, bool]]:
        position = 0
        for text, ends, document in texts:
            if not numbers or document != numbers[-1]:
                starts.append(position)
                numbers.append(document)
            position += len(text)
            yield text, ends

    def flush() -> Iterator[Piece]:
        encodings = tokenizer.encode_batch([text for text, _, _ in waiting], add_special_tokens=False)
        for encoding, (text, ends, at) in zip(encodings, waiting, strict=True):
            ids, characters = encoding.ids, [at + begin for begin, _ in encoding.offsets]
            if ends and eos_token_id is not None:
                ids, characters = [*ids, eos_token_id], [*characters, at + max(0, len(text) - 1)]
            documents = np.array(numbers, np.int64)[np.searchsorted(starts, characters, "right") - 1]
            yield Piece(np.array(ids, np.int64), documents, ends)
        passed = int(np.searchsorted(starts, waiting[-1][2], "right")) - 1 if waiting else 0
        del starts[:passed], numbers[:passed]

    waiting: list[tuple[str, bool, int]] = []  # (text, ends its unit, where it begins)
    at = size = 0
    for text, ends, _ in pieces(without_documents(), cut_rule(tokenizer_file)):
        waiting.append((text, ends, at))
        at, size = at + len(text), size + len(text) + 16
        if size >= _ENCODED_TOGETHER:
            yield from flush()
            waiting, size = [], 0
    yield from flush()


def document_starts(store: TokenStore, split: str) -> list[int]:
    """Where documents but the first begin: behind end-of-text tokens where rows have them, else at WikiText's titles.

    Finds none, so that all is one document, where there is no tokenizer that could tell a title.
    """
    ids = store.tokens(split)
    if store.record.get("append_eos"):
        return [end + 1 for end in _positions(ids, [store.eos_token_id]) if end + 1 < len(ids)]
    try:
        tokenizer = plain_tokenizer(store.path / "tokenizer" / "tokenizer.json")
    except Exception:  # the library knows no class of its own for what it can't read
        return []
    vocabulary = tokenizer.get_vocab()  # of a byte-level BPE: \u010a is a line end, \u0120 a space
    line_ends = [i for token, i in vocabulary.items() if token.endswith("\u010a")]
    signs = {i for token, i in vocabulary.items() if token.lstrip("\u0120").startswith("=")}
    starts = []
    for end in _positions(ids, line_ends):
        if end + 1 < len(ids) and int(ids[end + 1]) in signs:
            line = ids[end + 1 : end + 1 + _TITLE_TOKENS]
            ends = np.flatnonzero(np.isin(line, line_ends))
            if len(ends) and is_title(tokenizer.decode(line[: ends[0] + 1].tolist(), skip_special_tokens=False)):
                starts.append(end + 1)
    before = ids[: starts[0]].tolist() if starts and starts[0] < _TITLE_TOKENS else [0]
    return starts[1:] if starts and not tokenizer.decode(before).strip() else starts


def _positions(ids: np.ndarray, wanted: list[int]) -> Iterator[int]:
    for at in range(0, len(ids), 1 << 20):
        yield from (np.flatnonzero(np.isin(ids[at : at + (1 << 20)], wanted)) + at).tolist()
