"""Tokenizers: load one by name, train a byte-level BPE, tell two apart, and say where a text may be cut.

A fingerprint covers what decides ids (vocabulary, merges, added tokens, normalizer, pre-tokenizer) and nothing else, so
it is the same whichever version of transformers wrote the files.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wikift.base import hub
from wikift.base.errors import UserError
from wikift.data.tokenizer_files import EOS, OF_THE_HUB, Facts, copy_plain, facts, facts_of, has_tokenizer

_TAUGHT_RUN = 1000  # characters; longer unbroken runs are no words, and training on them takes memory by the gigabyte
_LONG_RUN = re.compile("|".join(rf"(?<!{c})({c}{{{_TAUGHT_RUN}}}){c}+" for c in (r"\w", r"\s", r"[^\w\s]")))


@dataclass(frozen=True)
class SavedTokenizer:
    """A tokenizer in a folder of its own. `vocab_size` is the largest id and one."""

    folder: Path
    name: str
    fingerprint: str
    vocab_size: int
    eos_token_id: int

    @property
    def file(self) -> Path:
        """The serialized `tokenizers.Tokenizer`."""
        return self.folder / "tokenizer.json"


# --- which one ---------------------------------------------------------------------------------------------------


def tokenizer_problems(tokenizer: str) -> list[str]:
    """What is wrong with `--tokenizer` as far as it shows without loading it."""
    if tokenizer.startswith("train:"):
        return []  # its SIZE is checked with the other settings
    folder = Path(tokenizer)
    if folder.is_dir():
        if not has_tokenizer(folder):
            found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
            return [
                f"--tokenizer {tokenizer}: has no tokenizer.json, nor vocab.json with merges.txt (there: {found}); "
                "name a folder that save_pretrained wrote"
            ]
    elif folder.exists():
        return [f"--tokenizer {tokenizer}: is a file; name the folder that it lies in"]
    elif not hub.is_name(tokenizer):
        return [
            f"--tokenizer {tokenizer}: no such folder; name one, a tokenizer of the Hub such as gpt2, or train:SIZE"
        ]
    return []


def load(name: str, folder: Path) -> SavedTokenizer:
    """Load tokenizer `name` (of the Hub, or a folder) and save a copy of it into `folder`.

    GPT-2's own kind is copied without transformers, which does the others.

    Raises UserError where there is none or it has no Rust implementation, EnvironmentFault where the Hub is out of
    reach.
    """
    if problems := tokenizer_problems(name):
        raise UserError(*problems)
    local = Path(name).is_dir()
    if not local:
        hub.offline_if_unreachable()
    shown = Path(name).resolve().name if local else name
    source = Path(name) if local else _snapshot(name)
    if source is not None and (eos := copy_plain(source, folder)) is not None:
        return _saved(folder, shown, eos, facts(source))
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # transformers raises OSError, ValueError, ImportError, JSON errors and Rust's own
        if local:
            raise UserError(f"--tokenizer {name}: cannot be loaded ({hub.one_line(error)})") from None
        raise hub.failure(error, f"--tokenizer {name}", "a folder with the tokenizer") from None
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"--tokenizer {name}: is written in Python only ({type(tokenizer).__name__}); wikift needs a fast one"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"--tokenizer {name}: has no end-of-text (eos) token; GPT-2's is {EOS}, set one and save it")
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        raise hub.as_os_error(error) from None
    return _saved(folder, shown, int(tokenizer.eos_token_id), facts(folder))


def rust_tokenizer(file: Path) -> Any:
    """The `tokenizers.Tokenizer` in `file`, which encodes all of a text: it neither truncates nor pads."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _snapshot(name: str) -> Path | None:
    """The folder of the Hub's cache with the files of tokenizer `name`; None where transformers is to say why not."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=OF_THE_HUB))
    except Exception:
        return None


def train(texts: Iterable[str], size: int, folder: Path) -> SavedTokenizer:
    """Train a byte-level BPE of `size` tokens on `texts` with GPT-2's pre-tokenization and save it into `folder`.

    The result depends on the texts only, not on the number of threads. Memory grows with the number of distinct words.
    The vocabulary is smaller than `size` where the texts hold too few pairs.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(map(_without_long_runs, texts), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    # GPT2Tokenizer is what every release of transformers, and other programs, read back to the same ids
    config = {
        "add_prefix_space": False,
        "bos_token": EOS,
        "eos_token": EOS,
        "unk_token": EOS,
        "model_max_length": 1024,
        "tokenizer_class": "GPT2Tokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return _saved(folder, f"train:{size}", int(tokenizer.token_to_id(EOS) or 0), facts(folder))


def _without_long_runs(text: str) -> str:
    return text if len(text) <= _TAUGHT_RUN else _LONG_RUN.sub(lambda match: match[match.lastindex or 0], text)


def _saved(folder: Path, name: str, eos_token_id: int, about: Facts) -> SavedTokenizer:
    for file in folder.iterdir():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
    return SavedTokenizer(folder, name, about.fingerprint, about.vocab_size, eos_token_id)


# --- telling them apart ------------------------------------------------------------------------------------------


def tokenizer_fingerprint(tokenizer: Any, *, setting: str = "--tokenizer") -> str:
    """SHA-256 over what decides a tokenizer's ids: a folder's, or that of a loaded (transformers or Rust) one.

    Raises UserError where a folder holds no tokenizer that can be read.
    """
    if isinstance(tokenizer, (str, Path)):
        try:
            return facts(Path(tokenizer)).fingerprint
        except FileNotFoundError:
            raise UserError(
                f"{setting} {tokenizer}: has no tokenizer.json, nor vocab.json with merges.txt; name a folder that has"
            ) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{setting} {tokenizer}: its tokenizer cannot be read ({hub.one_line(error)})") from None
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    return facts_of(json.loads(backend.to_str())).fingerprint
