"""Tokenizers: load one by name, train a byte-level BPE, tell two apart.

A fingerprint covers what decides ids (vocabulary, merges, added tokens, normalizer, pre-tokenizer, the model's options)
and nothing else, so it is the same whichever version of transformers wrote the files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wikift.base import hub
from wikift.base.errors import UserError, one_line

EOS = "<|endoftext|>"
FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
_PAIR = ("vocab.json", "merges.txt")  # what GPT-2's tokenizer was first published as
_OTHERS = ("added_tokens.json", "special_tokens_map.json", "chat_template.jinja", "additional_chat_templates")
_FLAGS = ("lstrip", "rstrip", "single_word")
_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
# What tokenizer_config.json may say of a tokenizer of GPT-2's kind: the last ones if false
_KEPT = {"model_max_length", "clean_up_tokenization_spaces", "name_or_path"}
_ANY = {"tokenizer_class", "added_tokens_decoder", "backend", "is_local", "local_files_only", "special_tokens_map_file"}
_IDLE = ("add_prefix_space", "add_bos_token", "split_special_tokens", "pad_token")
_ROLES = ("bos_token", "eos_token", "unk_token")

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


def tokenizer_problems(tokenizer: str) -> list[str]:
    """What is wrong with `--tokenizer` as far as it shows without loading it."""
    if tokenizer.startswith("train:"):
        return []  # its SIZE is checked with the other settings
    folder, where = Path(tokenizer), f"--tokenizer {tokenizer}"
    if (folder / FILE).is_file() or all((folder / name).is_file() for name in _PAIR):
        return []
    if folder.is_dir():
        files = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        lacks = f"has neither tokenizer.json nor vocab.json and merges.txt (there: {files})"
        return [f"{where}: {lacks}; name a folder that save_pretrained wrote"]
    if folder.exists():
        return [f"{where}: is a file; name its folder"]
    if not hub.is_name(tokenizer):
        return [f"{where}: no such folder; name one, a tokenizer on the Hub such as gpt2, or train:SIZE"]
    return []


def load_tokenizer(name: str, folder: Path) -> SavedTokenizer:
    """Load tokenizer `name` (of the Hub, or a folder) and save a copy of it into `folder`.

    GPT-2's own kind is read without transformers and torch, which take seconds to import and read the others. Raises
    UserError where there is none or none in Rust, EnvironmentFault where the Hub is out of reach.
    """
    if problems := tokenizer_problems(name):
        raise UserError(*problems)
    local = Path(name).resolve() if Path(name).is_dir() else None
    shown, source = (local.name, local) if local is not None else (name, hub.fetch(name, "--tokenizer", hub.TOKENIZER))
    if (plain := _gpt2s(source)) is not None:
        return _save(folder, shown, *plain)
    tokenizer = _by_transformers(source, f"--tokenizer {name}")
    if tokenizer.eos_token_id is None:
        raise UserError(f"--tokenizer {name}: has no end-of-text (eos) token; GPT-2's is {EOS}, set one and save it")
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        raise hub.as_os_error(error) from None
    return _saved(folder, shown, _content(tokenizer), int(tokenizer.eos_token_id))


def train(texts: Iterable[str], size: int, folder: Path) -> SavedTokenizer:
    """Train a byte-level BPE of `size` tokens on `texts` with GPT-2's pre-tokenization and save it into `folder`.

    The result depends on the texts only. Memory grows with the number of distinct words. The vocabulary is smaller than
    `size` where the texts hold too few pairs.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False)
    shorter = (t if len(t) <= _TAUGHT_RUN else _LONG_RUN.sub(lambda run: run[run.lastindex or 0], t) for t in texts)
    tokenizer.train_from_iterator(shorter, trainer)
    return _save(folder, f"train:{size}", _content(tokenizer), _config({"model_max_length": 1024}, EOS))


def tokenizer_fingerprint(tokenizer: Any, *, setting: str = "--tokenizer") -> str:
    """SHA-256 over what decides a tokenizer's ids: a folder's, or that of a loaded (transformers or Rust) one.

    Raises UserError where a folder holds no tokenizer that can be read.
    """
    if not isinstance(tokenizer, (str, Path)):
        return _fingerprint(_content(tokenizer))
    folder, where = Path(tokenizer), f"{setting} {tokenizer}"
    if not folder.is_dir() or tokenizer_problems(str(folder)):
        raise UserError(f"{where}: has neither tokenizer.json nor vocab.json and merges.txt; name another folder")
    try:
        plain = (_read(folder), {}) if (folder / FILE).is_file() else _gpt2s(folder)
        return _fingerprint(plain[0] if plain is not None else _content(_by_transformers(folder, where)))
    except UserError:
        raise
    except Exception as error:  # Rust's own
        raise UserError(f"{where}: its tokenizer cannot be read ({one_line(error)})") from None


def _content(tokenizer: Any) -> Content:
    """The `tokenizer.json` of a loaded (transformers or Rust) tokenizer, in today's spelling."""
    return dict(json.loads(getattr(tokenizer, "backend_tokenizer", tokenizer).to_str()))


def _read(folder: Path, end: str = EOS) -> Content:
    """The content of tokenizer.json, or of GPT-2's older pair of files with `end` as the one special token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    if (folder / FILE).is_file():
        return _content(Tokenizer.from_file(str(folder / FILE)))
    tokenizer = Tokenizer(models.BPE.from_file(*(str(folder / name) for name in _PAIR)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([end])
    return _content(tokenizer)


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


def _text(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def _json(path: Path) -> Content:
    return dict(json.loads(path.read_bytes())) if path.is_file() else {}


def _save(folder: Path, name: str, content: Content, config: Content) -> SavedTokenizer:
    """Write a tokenizer of GPT-2's kind as transformers would."""
    folder.mkdir(parents=True, exist_ok=True)
    (end,) = content["added_tokens"]
    content = {
        **content, "truncation": None, "padding": None, "post_processor": None,
        "added_tokens": [{**end, "normalized": False, "special": True}],
        "pre_tokenizer": _LEVEL, "decoder": {**_LEVEL, "add_prefix_space": True},
    }  # fmt: skip
    (folder / FILE).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return _saved(folder, name, content, int(end["id"]))


def _saved(folder: Path, name: str, content: Content, eos_token_id: int) -> SavedTokenizer:
    for file in folder.iterdir():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
    return SavedTokenizer(
        folder, name, _fingerprint(content), 1 + max(_deciding(content)["ids"].values()), eos_token_id
    )


def _by_transformers(folder: Path, where: str) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises OSError, ValueError, ImportError, JSON errors and Rust's own
        raise UserError(f"{where}: cannot be loaded ({one_line(error)})") from None
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{where}: is a slow (Python) tokenizer ({type(tokenizer).__name__}); wikift needs a fast one")
    return tokenizer


def _gpt2s(folder: Path) -> tuple[Content, Content] | None:
    """The contents of tokenizer.json and tokenizer_config.json for a tokenizer of GPT-2's kind.

    None where transformers could see anything in the files that would act in another way; it says what is wrong.
    """
    try:
        if (config := _gpt2s_config(folder)) is None:
            return None
        content = _read(folder, end := config["eos_token"])
        deciding = _deciding(content)
    except Exception:  # of JSON, of the file system, and Rust's own
        return None
    expected = {"model": "BPE", "options": None, "normalizer": None, "added": [[end, False, False, False]]}
    expected["pre_tokenizer"] = _without_offsets(_LEVEL)
    frame = (content["post_processor"] or {}).get("special_tokens")
    alike = all(deciding.get(key) == value for key, value in expected.items()) and end in content["model"]["vocab"]
    return (content, config) if alike and not frame else None


def _gpt2s_config(folder: Path) -> Content | None:
    """The tokenizer_config.json of GPT-2's class with one special token, the end of text; None if it says more."""
    if any((folder / name).exists() for name in _OTHERS):
        return None
    config, kind = _json(folder / CONFIG), _json(folder / "config.json").get("model_type")
    tokens = [*(config.get(role, EOS) for role in _ROLES), *config.get("added_tokens_decoder", {}).values()]
    end = _text(tokens[1])
    stated = {
        key for key, value in config.items() if (value or key not in _IDLE) and (key, value) != ("errors", "replace")
    }
    named = "tokenizer_class" in config or not (config or (folder / FILE).exists())  # vocab.json and merges.txt alone
    if (
        config.get("tokenizer_class", "GPT2Tokenizer") not in ("GPT2Tokenizer", "GPT2TokenizerFast")
        or kind not in ("gpt2", None)
        or (kind is None and not named)
        or any(_text(t) != end or (isinstance(t, dict) and any(t.get(flag) for flag in _FLAGS)) for t in tokens)
        or stated - {*_ROLES} - _KEPT - _ANY
    ):
        return None
    return _config({key: value for key, value in config.items() if key in _KEPT}, end)


def _config(kept: Content, end: str) -> Content:
    # GPT2Tokenizer is what every release of transformers, and other programs, read back to the same ids
    return {**kept, **dict.fromkeys(_ROLES, end), "add_prefix_space": False, "tokenizer_class": "GPT2Tokenizer"}
