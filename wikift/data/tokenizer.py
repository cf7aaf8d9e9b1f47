"""Tokenizers: load one by name, train a byte-level BPE, tell two apart.

A fingerprint covers what decides ids (vocabulary, merges, added tokens, normalizer, pre-tokenizer, the model's options)
and nothing else, so it is the same whichever version of transformers wrote the files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wikift.base import hub
from wikift.base.errors import UserError, one_line
from wikift.base.files import is_lfs_pointer, replace_json

EOS = "<|endoftext|>"
FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
_PAIR = ("vocab.json", "merges.txt")  # what GPT-2's tokenizer was first published as
_FLAGS = ("lstrip", "rstrip", "single_word")
# of a trained one; GPT2Tokenizer is what every release of transformers, and other programs, read back to the same ids
_CONFIG = {**dict.fromkeys(("bos_token", "eos_token", "unk_token"), EOS), "add_prefix_space": False,
           "model_max_length": 1024, "tokenizer_class": "GPT2Tokenizer"}  # fmt: skip
_ENDS = (EOS, "</s>", "[SEP]", "<eos>", "<|end_of_text|>")  # what tokenizers call the end of a text
_COPY = """from transformers import AutoTokenizer as T; \
t = T.from_pretrained({}, trust_remote_code=False); {}t.save_pretrained({})"""

_TAUGHT_RUN = 1000  # characters; longer unbroken runs are no words, and training on them takes memory by the gigabyte
_LONG_RUN = re.compile("|".join(rf"(?<!{c})({c}{{{_TAUGHT_RUN}}}){c}+" for c in (r"\w", r"\s", r"[^\w\s]")))

Content = dict[str, Any]


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
        return self.folder / FILE


def tokenizer_problems(tokenizer: str, setting: str = "--tokenizer") -> list[str]:
    """What is wrong with a tokenizer's name or folder as far as it shows without loading it."""
    folder, where = Path(tokenizer), f"{setting} {tokenizer}"
    if folder.is_file():
        return [f"{where}: is a file; name its folder"]
    if folder.is_dir():
        for path in folder.glob("*.*"):
            if path.suffix in (".json", ".txt", ".model") and is_lfs_pointer(path):
                pull = f"git -C {shlex.quote(tokenizer)} lfs pull"
                return [f"{where}: {path.name} is a Git LFS pointer, not the file; run: {pull}"]
        pair = all((folder / name).is_file() for name in _PAIR)
        if pair or any((folder / name).is_file() for name in (FILE, "vocab.txt")) or any(folder.glob("*.model")):
            return []
        files = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        lacks = f"has no tokenizer, neither tokenizer.json nor vocab.json and merges.txt (there: {files})"
        return [f"{where}: {lacks}; copy the one that its model was trained with, GPT-2's for example: "
                + _python(_COPY, "gpt2", "", tokenizer)]  # fmt: skip
    if not tokenizer.startswith("train:") and not hub.is_name(tokenizer):  # its SIZE is checked with the settings
        return [f"{where}: no such folder; name one, a tokenizer on the Hub such as gpt2, or train:SIZE"]
    return []


def load_tokenizer(name: str, folder: Path, setting: str = "--tokenizer") -> SavedTokenizer:
    """Load tokenizer `name` (of the Hub, or a folder) as AutoTokenizer does and save a copy of it into `folder`.

    Raises UserError where there is none or none in Rust, EnvironmentFault where the Hub is out of reach.
    """
    tokenizer = by_transformers(name, setting)
    shown = Path(name).resolve().name if Path(name).is_dir() else name
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        raise hub.as_os_error(error) from None
    return _saved(folder, shown, _content(tokenizer), int(tokenizer.eos_token_id))


def by_transformers(name: str, setting: str = "--tokenizer") -> Any:
    """The tokenizer as transformers loads it. Raises as `load_tokenizer` does."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    source, where = _source(name, setting), f"{setting} {name}"
    files = {path.name for path in source.iterdir()}
    bare = {"tokenizer_type": "gpt2"} if files >= {*_PAIR} and not files & {FILE, CONFIG, "config.json"} else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **bare)
        special = "".join(map(str, tokenizer.all_special_tokens))
        ids = tokenizer(special, add_special_tokens=False)["input_ids"]  # a setting of a wrong type shows in its use
    except Exception as error:  # transformers raises OSError, ValueError, ImportError, JSON errors and Rust's own
        models = any(file.endswith(".model") for file in files)
        more = "; for a .model file: pip install sentencepiece tiktoken protobuf" if models else "; copy it again"
        raise UserError(f"{where}: its tokenizer cannot be loaded ({one_line(error)}){more}") from None
    kind, copied = type(tokenizer).__name__, shlex.quote(f"{name}-copy")
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{where}: is a slow (Python) tokenizer ({kind}); wikift needs a fast one, with {FILE}")
    plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()).encode(special, add_special_tokens=False)
    if plain.ids != ids:
        raise UserError(f"{where}: {CONFIG} has {kind} split text in another way than {FILE}; remove that setting "
                        "(split_special_tokens, say)")  # fmt: skip
    if tokenizer.eos_token_id is None:
        vocabulary = tokenizer.get_vocab()
        end = next((token for token in _ENDS if token in vocabulary), None)
        change = f"t.eos_token = {end!r}; " if end else f"t.add_special_tokens(dict(eos_token={EOS!r})); "
        raise UserError(
            f"{where}: has no end-of-text (eos) token, which ends documents and answers; choose one: "
            f"{_python(_COPY, name, change.replace(chr(39), chr(34)), copied)}, and name {copied}"
        )
    return tokenizer


def _source(name: str, setting: str) -> Path:
    if problems := tokenizer_problems(name, setting):
        raise UserError(*problems)
    source = hub.fetch(name, setting, hub.TOKENIZER)
    if not Path(name).exists() and (problems := tokenizer_problems(str(source), setting)):
        raise UserError(problems[0].replace(str(source), name))
    return source


def _python(code: str, source: str, change: str, target: str) -> str:
    return f"python -c {shlex.quote(code.format(json.dumps(source), change, json.dumps(target)))}"


def train(texts: Iterable[str], size: int, folder: Path) -> SavedTokenizer:
    """Train a byte-level BPE of `size` tokens on `texts` with GPT-2's pre-tokenization and save it into `folder`.

    The result depends on the texts only. Memory grows with the number of distinct words. The vocabulary is smaller than
    `size` where the texts hold too few pairs.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False)
    shorter = (t if len(t) <= _TAUGHT_RUN else _LONG_RUN.sub(lambda run: run[run.lastindex or 0], t) for t in texts)
    tokenizer.train_from_iterator(shorter, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(tokenizer.to_str(), encoding="utf-8")  # its own save raises no OSError
    replace_json(folder / CONFIG, _CONFIG)
    return _saved(folder, f"train:{size}", _content(tokenizer), tokenizer.get_vocab()[EOS])


def tokenizer_fingerprint(tokenizer: Any, *, setting: str = "--tokenizer") -> str:
    """SHA-256 over what decides a tokenizer's ids: a folder's, or that of a loaded (transformers or Rust) one.

    Raises as `load_tokenizer` does.
    """
    loaded = by_transformers(str(tokenizer), setting) if isinstance(tokenizer, (str, Path)) else tokenizer
    return _fingerprint(_content(loaded))


def _content(tokenizer: Any) -> Content:
    """The `tokenizer.json` of a loaded (transformers or Rust) tokenizer, in today's spelling."""
    return dict(json.loads(getattr(tokenizer, "backend_tokenizer", tokenizer).to_str()))


def _deciding(content: Content) -> Content:
    """What decides ids, in one spelling: tokens with their ids, merges in order, added tokens, the two steps before."""
    model, added = content["model"], content["added_tokens"]
    vocabulary = model["vocab"]
    options = {key: value for key, value in model.items() if key not in ("type", "vocab", "merges")}
    options = {key: value for key, value in options.items() if value not in (None, "") and value is not False}
    if isinstance(vocabulary, list):  # Unigram's, with the probability of each
        options["scores"] = [score for _, score in vocabulary]
        vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
    return {
        "model": model["type"],
        "ids": {**vocabulary, **{token["content"]: token["id"] for token in added}},
        "merges": model.get("merges") or [],
        "added": sorted([token["content"], *(token[flag] for flag in _FLAGS)] for token in added),
        "normalizer": content["normalizer"],
        "pre_tokenizer": _without_offsets(content["pre_tokenizer"]),
        **({"options": options} if options else {}),
    }


def _fingerprint(content: Content) -> str:
    text = json.dumps(_deciding(content), sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _without_offsets(value: Any) -> Any:  # which decide positions in the text only
    if isinstance(value, dict):
        return {name: _without_offsets(inner) for name, inner in value.items() if name != "trim_offsets"}
    return [_without_offsets(inner) for inner in value] if isinstance(value, list) else value


def _saved(folder: Path, name: str, content: Content, eos_token_id: int) -> SavedTokenizer:
    for file in folder.iterdir():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
    size = 1 + max(_deciding(content)["ids"].values())
    return SavedTokenizer(folder, name, _fingerprint(content), size, eos_token_id)
