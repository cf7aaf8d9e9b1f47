"""The prepare command: text to a token store. The work is in `data.prepare`."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wikift.base import folders
from wikift.base.command import command_line
from wikift.base.console import print
from wikift.base.launcher import launch
from wikift.base.names import CUT_SEED
from wikift.base.shape import released_name
from wikift.settings.checks import check_data
from wikift.settings.fields import DataSettings, PrepareSettings
from wikift.settings.options import Parsed, parse_all
from wikift.settings.resolve import fallback_dataset, store_path
from wikift.watch.record import aligned

if TYPE_CHECKING:
    from wikift.data.prepare import Request
    from wikift.data.sources import Source
    from wikift.data.store import TokenStore

DEFAULT_TOKENIZER = "gpt2"


def main(argv: Sequence[str]) -> int:
    parsed = parse_all(PrepareSettings, argv)
    if launch().rank:  # rank 0 tells
        parsed = dataclasses.replace(parsed, settings=dataclasses.replace(parsed.settings, quiet=True))
    return _report(make(parsed), parsed.settings)


def make(parsed: Parsed[PrepareSettings]) -> Path:
    """The store that the settings ask for, made where it does not exist yet; returns its folder."""
    settings = parsed.settings

    def say(text: str) -> None:
        if not settings.quiet:
            print(text, file=sys.stderr, flush=True)

    if settings.verify and settings.dataset is None and settings.out is not None:
        parsed.refuse(())
        return Path(settings.out)
    dataset = settings.dataset or (fallback_dataset(launch().size),)
    settings = dataclasses.replace(settings, dataset=dataset, tokenizer=settings.tokenizer or DEFAULT_TOKENIZER)
    out = Path(settings.out) if settings.out is not None else store_path(settings)
    parsed.refuse(data_problems(settings, out))
    if parsed.settings.dataset is None:
        say(f"--dataset is not set: using {dataset[0]}")
    exists = (out / "store.json").exists()
    make_store(settings, settings.seed, out, quiet=settings.quiet, say=say, setting="--out")
    if exists:
        say(f"{out} already exists, with the same recipe")
    return out


def request_of(settings: DataSettings, seed: int) -> Request:
    from wikift.data.prepare import Request

    return Request(source_of(settings, seed), str(settings.tokenizer), settings.append_eos, settings.workers)


def source_of(settings: DataSettings, seed: int = CUT_SEED) -> Source:
    from wikift.data.sources import Source

    dataset, *more = settings.dataset or ("",)
    fraction, encoding = settings.validation_fraction, settings.encoding
    return Source(
        dataset, settings.dataset_config, settings.text_column, fraction, seed, encoding, tuple(more),
        settings.dataset_revision,
    )  # fmt: skip


def data_problems(settings: DataSettings, out: Path | None = None) -> list[str]:
    """Every problem of dataset, tokenizer and `out` that shows without reading text or asking the Hub."""
    from wikift.data.prepare import out_problems, request_problems

    problems = check_data(settings) + request_problems(request_of(settings, 0))
    return problems if out is None else problems + out_problems(out)


def make_store(
    settings: DataSettings, seed: int, out: Path, *, quiet: bool, say: Callable[[str], None], setting: str = "the store"
) -> None:
    from wikift.base.console import Progress
    from wikift.data.prepare import ensure_store

    ensure_store(request_of(settings, seed), out, say=say, progress=Progress(quiet), setting=setting)


def _report(out: Path, settings: PrepareSettings) -> int:
    from wikift.data.store import open_store

    if settings.quiet and not settings.verify:
        return 0
    store = open_store(out, verify=settings.verify, setting="--out")
    if not settings.quiet:
        print(_table(store))
        ready = f"{out}: {'every checksum is right' if settings.verify else 'ready'}"
        if "train" in store.splits and store.splits["train"].tokens <= 2:
            print(f"{ready}; its train split is too short for a training")
        else:
            print(f"{ready}. Next:\n  {command_line('train')} {_what_train_needs(store, settings.tokenizer)}")
    return 0


def _what_train_needs(store: TokenStore, tokenizer: str | None) -> str:
    """The options with which train takes a store made with `tokenizer`."""
    name = tokenizer or str(store.record.get("tokenizer", {}).get("name", DEFAULT_TOKENIZER))
    options = ["--data", str(store.path)]
    if released_name(name) or (folders.is_model(Path(name)) and any(Path(name).glob("*.safetensors"))):
        options += ["--model", name] if name != DEFAULT_TOKENIZER else []
    elif store.vocab_size != 50257:  # else a copy of GPT-2's
        options.append("--from-scratch")
    tokens = store.splits["train"].tokens if "train" in store.splits else 0
    if 2 < tokens <= 1024:  # too few for a block of GPT-2's context
        options += ["--block-size", str(1 << ((tokens - 1).bit_length() - 1))]
    return shlex.join(options)


def _table(store: TokenStore) -> str:
    rows = [("split", "rows", "tokens", "words", "bytes")]
    for name, split in store.splits.items():
        rows.append((name, f"{split.rows:,}", f"{split.tokens:,}", f"{split.words:,}", f"{split.bytes:,}"))
    return aligned(rows, right=True)
