"""Text to a token store: made once, by the first process that asks for it.

A store made by the same recipe is reused at once; one made by another recipe is left unchanged and is an error.
Speed is 100 MB/s and more on two cores with gigatoken (`fast_encode`), else that of `tokenizers`, 2 MB/s on each core.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from wikift.base import hub
from wikift.base.console import Progress
from wikift.base.errors import UserError
from wikift.data import encode, fast_encode, tokenizer
from wikift.data.corpus import Corpus
from wikift.data.recipe import check_recipe, facts_of, is_unchanged, record_of
from wikift.data.sources import Source, open_source, source_problems
from wikift.data.store import Encoded, TokenStore, dtype_for, open_store, write_store
from wikift.data.tokenizer import SavedTokenizer
from wikift.data.user_files import CHANGED

SLOW_BYTES = 10_000_000  # less is done before anybody wonders

Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """The store that is asked for. `append_eos` None: where rows are documents; `workers` None: all cores."""

    source: Source
    tokenizer: str
    append_eos: bool | None = None
    workers: int | None = None


def request_problems(request: Request) -> list[str]:
    """Every problem of dataset and tokenizer that shows without reading text, loading a tokenizer or asking the Hub."""
    return source_problems(request.source) + tokenizer.tokenizer_problems(request.tokenizer)


def out_problems(out: Path) -> list[str]:
    if (out / "store.json").exists():
        return []
    if out.is_symlink():
        return [f"--out {out}: is a symbolic link; name the folder itself"]
    if out.is_dir():
        if any(out.iterdir()):
            return [f"--out {out}: is a folder that contains other files; name a new folder"]
        mount = out.resolve().is_mount()
        if mount or out.resolve() == Path.cwd():
            kind = "a mount point" if mount else "the current folder"
            return [f"--out {out}: is {kind}, which cannot be replaced; name a folder in it"]
    elif out.exists():
        return [f"--out {out}: is a file; name a folder"]
    files = [str(above) for above in out.parents if above.is_file()]
    return [f"--out {out}: {files[0]} is a file, not a folder; name another folder"] if files else []


def ensure_store(request: Request, out: Path, *, say: Say, progress: Progress, setting: str = "the store") -> None:
    """Return when the store is at `out`: already present, made by this process, or by one that it waited for.

    Needs no process group and has no time limit, so every rank may call it. `say` gets one line at a time; the last
    tells the speed. Raises UserError for settings and files that the user must fix, also where a store made by another
    recipe is at `out`, and EnvironmentFault for disk and network; nothing stays behind then.
    """
    from wikift.base.publish import make_once

    if problems := request_problems(request) + out_problems(out):
        raise UserError(*problems)
    made = []

    def make(folder: Path) -> None:
        _prepare(request, folder, say, progress)
        made.append(folder)

    def wait() -> None:
        say(f"waiting for another process that is preparing {out}")

    try:
        make_once(out, make, is_made=(out / "store.json").exists, wait=wait)
    finally:
        progress.clear()
    if not made:
        store = open_store(out, setting=setting)
        check_recipe(request.source, request.tokenizer, request.append_eos, store)


# --- the work ----------------------------------------------------------------------------------------------------


def _prepare(request: Request, folder: Path, say: Say, progress: Progress) -> None:
    began, source = time.perf_counter(), request.source
    if progress.quiet:
        hub.be_quiet()
    corpus = open_source(source)
    facts = facts_of(source, checksums=True)
    for note in corpus.notes:
        say(note)
    told = len(corpus.notes)
    first: dict[str, tuple[str, Path]] = {}  # split and file with a content
    for split, entries in facts.get("files", {}).items():
        for path, entry in zip(source.files.paths(split), entries, strict=True):  # type: ignore[union-attr]
            other, other_path = first.setdefault(entry["sha256"], (split, path))
            if other_path != path:  # an archive may have several splits
                say(f"{other}: {other_path.name} and {split}: {path.name} have the same content")
    saved = _tokenizer(request, corpus, folder / "tokenizer", say, progress)
    append_eos = corpus.rows_are_documents if request.append_eos is None else request.append_eos
    record = record_of(facts, corpus, saved, append_eos, source)
    starts: list[float] = []  # of reading each split

    def write(encode_chunk: encode.EncodeChunk, gpt2s_kind: bool) -> TokenStore:
        def parts(split: str) -> Iterator[Encoded]:
            starts.append(time.perf_counter())
            chunks = encode.chunks(corpus.splits[split](), cut=gpt2s_kind)
            encoded = encode.encode_all(chunks, encode_chunk, request.workers or len(os.sched_getaffinity(0)))
            counted = progress.over(split, corpus.sizes[split], encoded, lambda part: (part.bytes, len(part.ids)))
            yield from _with_text(f"--dataset {source.dataset}: its {split} split", counted, corpus.cut is not None)

        return write_store(
            folder, {split: parts(split) for split in corpus.splits}, vocab_size=saved.vocab_size,
            eos_token_id=saved.eos_token_id, tokenizer_fingerprint=saved.fingerprint, record=record,
        )  # fmt: skip

    store = _by_either(write, saved, append_eos, corpus.sizes.get("train") or 0, say)
    progress.clear()
    if not is_unchanged(source, store):
        raise UserError(f"{source.dataset}: {CHANGED}")
    for note in corpus.notes[told:]:  # of the reading
        say(note)
    size, seconds = sum(split.bytes for split in store.splits.values()), time.perf_counter() - starts[0]
    if size > SLOW_BYTES:
        rate = f"{size / 1e6:,.0f} MB of text in {seconds:.1f} s, {size / seconds / 1e6:,.3g} MB/s"
        say(f"{rate}, after {starts[0] - began:.1f} s of start-up")


def _by_either(
    write: Callable[[encode.EncodeChunk, bool], TokenStore],
    saved: SavedTokenizer,
    append_eos: bool,
    size: int,
    say: Say,
) -> TokenStore:
    """The store by gigatoken where that is possible and right, else by `tokenizers`."""
    setup = (saved.file, saved.eos_token_id if append_eos else None, dtype_for(saved.vocab_size))
    gpt2s_kind = encode.splits_at_spaces(saved.file)
    reason = "gigatoken is used for tokenizers of GPT-2's kind only"
    if gpt2s_kind:
        try:
            return write(fast_encode.fast_chunk_encoder(*setup), gpt2s_kind)
        except fast_encode.Disagreement as error:
            reason = str(error)
    if size > SLOW_BYTES:
        say(f"{reason}: encoding with tokenizers, at about 2 MB/s on each core")
    return write(encode.chunk_encoder(*setup), gpt2s_kind)


def _with_text(name: str, parts: Iterator[Encoded], cut: bool) -> Iterator[Encoded]:
    """The parts; raises UserError at their end where there is no word in them."""
    rows = word_count = 0
    for part in parts:
        rows, word_count = rows + part.rows, word_count + part.words
        yield part
    if word_count == rows:  # each row counts one end of line
        content = f"{rows:,} blank rows" if rows else "no rows"
        way = "cut other rows with --validation-fraction or --seed" if cut else "remove its file, if another has text"
        raise UserError(f"{name} contains no text ({content}); use a dataset that does, or {way}")


def _tokenizer(request: Request, corpus: Corpus, folder: Path, say: Say, progress: Progress) -> SavedTokenizer:
    name = request.tokenizer
    if not name.startswith("train:"):
        return tokenizer.load_tokenizer(name, folder)
    if "train" not in corpus.splits:
        raise UserError(f"--tokenizer {name}: {request.source.dataset} has no train split; name a tokenizer")
    size = int(name.removeprefix("train:"))
    say(f"training a byte-level BPE of {size:,} tokens on the train split")
    texts = (piece for piece, _ in encode.pieces((text, True) for text in corpus.texts("train")))
    counted = progress.over("tokenizer", corpus.sizes["train"], texts, lambda text: (len(text.encode()), 0))
    saved = tokenizer.train(counted, size, folder)
    progress.clear()
    if saved.vocab_size < size:
        say(f"the text is too small for a vocabulary of {size:,}; it has {saved.vocab_size:,}")
    return saved
