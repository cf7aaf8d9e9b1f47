"""The files of a tokenizer: what in them decides ids, and GPT-2's kind read and written without transformers.

transformers and torch take seconds to import, so `plain` tells whether a folder holds nothing in which they could see
more than what is here; any doubt leaves the folder to them.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EOS = "<|endoftext|>"
FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
_PAIR = ("vocab.json", "merges.txt")  # what GPT-2's tokenizer was first published as
_OTHERS = ("added_tokens.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json")
OF_THE_HUB = [FILE, CONFIG, *_PAIR, *_OTHERS, "additional_chat_templates/*", "config.json"]

# Settings of tokenizer_config.json that change nothing at these values, and those that may have any
_IDLE = {
    "add_prefix_space": False, "add_bos_token": False, "split_special_tokens": False, "pad_token": None,
    "errors": "replace",
}  # fmt: skip
_ANY = {"model_max_length", "clean_up_tokenization_spaces", "name_or_path"}
_OF_TRANSFORMERS = {"backend", "is_local", "local_files_only", "special_tokens_map_file"}  # notes of its own
_OF_OTHER_BPES = (
    "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback",
    "ignore_merges",
)  # fmt: skip
_FLAGS = ("lstrip", "rstrip", "single_word")

Content = dict[str, Any]


@dataclass(frozen=True)
class Facts:
    """Of a tokenizer: SHA-256 over what decides its ids, and the largest id and one."""

    fingerprint: str
    vocab_size: int


def has_tokenizer(folder: Path) -> bool:
    """Whether there is a tokenizer.json, or vocab.json with merges.txt."""
    return (folder / FILE).is_file() or all((folder / name).is_file() for name in _PAIR)


def facts(folder: Path) -> Facts:
    """Raises what reading and parsing raise: OSError, ValueError, KeyError, TypeError, AttributeError."""
    return _facts(tuple(_read(folder).items()))


@functools.lru_cache(2)
def _facts(files: tuple[tuple[str, bytes], ...]) -> Facts:
    return facts_of(_content(dict(files)))


def facts_of(content: Content) -> Facts:
    """Of the content of a `tokenizer.json`."""
    form = _normal_form(content)
    text = json.dumps(form, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return Facts(hashlib.sha256(text.encode()).hexdigest(), 1 + max(form["ids"].values()))


def _read(folder: Path) -> dict[str, bytes]:
    """The files that decide, by their names."""
    if (folder / FILE).is_file():
        return {FILE: (folder / FILE).read_bytes()}
    found = {name: (folder / name).read_bytes() for name in _PAIR}
    return {**found, CONFIG: (folder / CONFIG).read_bytes()} if (folder / CONFIG).is_file() else found


def _content(files: Mapping[str, bytes]) -> Content:
    """Of the `tokenizer.json` that is there, or that GPT-2's older pair of files stands for."""
    if FILE in files:
        return dict(json.loads(files[FILE]))
    vocabulary = json.loads(files["vocab.json"])
    lines = files["merges.txt"].decode().replace("\r\n", "\n").split("\n")
    config = json.loads(files.get(CONFIG, b"{}"))
    special = {_text(config.get(f"{role}_token", EOS)) for role in ("bos", "eos", "unk")}
    special |= {_text(config[f"{role}_token"]) for role in ("pad", "sep", "cls", "mask") if config.get(f"{role}_token")}
    special |= {_text(entry) for entry in config.get("added_tokens_decoder", {}).values()}
    free = 1 + max(vocabulary.values())
    added = []
    for token in sorted(special):
        if token not in vocabulary:
            vocabulary[token], free = free, free + 1
        added.append({"id": vocabulary[token], "content": token})
    merges = [line.split(" ", 1) for line in lines if line and not line.startswith("#version")]
    return _spelt_out(vocabulary, merges, added, bool(config.get("add_prefix_space", False)))


def _spelt_out(vocabulary: dict[str, int], merges: list[list[str]], added: list[Content], prefix: bool) -> Content:
    """A whole `tokenizer.json`."""
    level = {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token["id"], "content": token["content"], **dict.fromkeys(_FLAGS, False)}
            | {"normalized": False, "special": True}
            for token in added
        ],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": {**level, "add_prefix_space": True},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
    }


def _text(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def _normal_form(content: Content) -> Content:
    """What decides ids, in one spelling: tokens with their ids, merges in order, added tokens, the two steps before."""
    model, added = content["model"], content.get("added_tokens") or []
    return {
        "model": model.get("type"),
        "ids": {**model["vocab"], **{token["content"]: token["id"] for token in added}},
        "merges": _pairs(model),
        "added": sorted([token["content"], *(bool(token.get(flag)) for flag in _FLAGS)] for token in added),
        "normalizer": content.get("normalizer"),
        "pre_tokenizer": _without(content.get("pre_tokenizer"), "trim_offsets"),
    }


def _pairs(model: Content) -> list[list[str]]:
    return [pair.split(" ", 1) if isinstance(pair, str) else list(pair) for pair in model.get("merges") or []]


def _without(value: Any, key: str) -> Any:
    if isinstance(value, dict):
        return {name: _without(inner, key) for name, inner in value.items() if name != key}
    return [_without(inner, key) for inner in value] if isinstance(value, list) else value


# --- GPT-2's kind, without transformers --------------------------------------------------------------------------


def copy_plain(source: Path, folder: Path) -> int | None:
    """Write `folder` as transformers would write `source`, loaded and saved; gives the id of its end-of-text token.

    None, and nothing is written, where the files hold anything that could act in another way than GPT-2's.
    """
    try:
        found = _plain(source)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # what is wrong with them is said by transformers
    if found is None:
        return None
    content, config = found
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return int(content["added_tokens"][0]["id"])


def _plain(source: Path) -> tuple[Content, Content] | None:
    """The contents of tokenizer.json and tokenizer_config.json, if the one special token is the end of text."""
    if any((source / name).exists() for name in (*_OTHERS, "additional_chat_templates")):
        return None
    config = json.loads((source / CONFIG).read_bytes()) if (source / CONFIG).is_file() else {}
    model_config = source / "config.json"
    model_type = json.loads(model_config.read_bytes()).get("model_type") if model_config.is_file() else None
    roles = {role: config.get(role, EOS) for role in ("bos_token", "eos_token", "unk_token")}
    end = _text(roles["eos_token"])
    listed = config.get("added_tokens_decoder", {}).values()
    other = {*config} - {*roles, *_ANY, *_OF_TRANSFORMERS, "tokenizer_class", "added_tokens_decoder"}
    if (
        config.get("tokenizer_class", "GPT2Tokenizer") not in ("GPT2Tokenizer", "GPT2TokenizerFast")
        or model_type not in ("gpt2", None)
        or (model_type is None and "tokenizer_class" not in config)
        or not all(_is_plain(token, end) for token in (*roles.values(), *listed))
        or not all(key in _IDLE and config[key] == _IDLE[key] for key in other)
    ):
        return None
    content = _content(_read(source))
    if not _is_gpt2s(content, end):
        return None
    kept = {key: value for key, value in config.items() if key in _ANY}
    settings = {**kept, **dict.fromkeys(roles, end), "add_prefix_space": False, "tokenizer_class": "GPT2Tokenizer"}
    model = content["model"]
    return _spelt_out(model["vocab"], _pairs(model), content["added_tokens"], False), settings


def _is_plain(token: Any, end: str) -> bool:
    return _text(token) == end and not (isinstance(token, dict) and any(token.get(flag) for flag in _FLAGS))


def _is_gpt2s(content: Content, end: str) -> bool:
    """Whether this `tokenizer.json` is a whole byte-level BPE that says nothing but vocabulary, merges and `end`."""
    model, added = content["model"], content.get("added_tokens") or []
    vocabulary, before = model["vocab"], _without(content.get("pre_tokenizer") or {}, "trim_offsets")
    after, back = content.get("post_processor") or {}, content.get("decoder") or {}
    return (
        model.get("type") in ("BPE", None)
        and not any(model.get(key) for key in _OF_OTHER_BPES)
        and content.get("normalizer") is None
        and {"use_regex": True, **before} == {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
        and (after.get("type", "ByteLevel") == "ByteLevel" or after.get("special_tokens") == {})
        and back.get("type", "ByteLevel") == "ByteLevel"
        and len(added) == 1
        and _is_plain(added[0], end)
        and vocabulary.get(end) == added[0]["id"]
        and all(type(number) is int and 0 <= number < 1 << 32 for number in vocabulary.values())
        and all(a in vocabulary and b in vocabulary and a + b in vocabulary for a, b in _pairs(model))
    )
