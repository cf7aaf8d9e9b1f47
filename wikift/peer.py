"""A checkpoint of DeepSpeed or of torch.distributed.checkpoint to a Hugging Face directory.

Needs neither DeepSpeed nor a process group nor a GPU. The weights come from zerofolder.py or dcpfolder.py; the
configuration and the tokenizer from a model folder in or above the checkpoint, or from --model.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from wikift import __version__
from wikift.base import folders
from wikift.base.errors import UserError
from wikift.base.signals import stopping_by_exception
from wikift.base.sizes import parse_size, show_bytes
from wikift.dcpfolder import is_dcp_folder, open_dcp
from wikift.export.card import peer_card
from wikift.export.folder import FORMAT, check_target, published, write_json
from wikift.export.weights import HEAD, Weights, write_weights
from wikift.gpt2names import agreed_config, dimensions, ordered_names, plain_names
from wikift.zerofolder import choose_zero, is_zero_folder, open_zero

_EMBEDDING = "transformer.wte.weight"
_TOKENIZER = ("tokenizer.json", "vocab.json")
_BESIDE = (
    *_TOKENIZER, "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "generation_config.json",
)  # fmt: skip


class _Found(NamedTuple):
    kind: str
    path: Path
    weights: Weights  # by Hugging Face name
    facts: dict[str, Any]


def is_peer(folder: Path) -> bool:
    """Whether `folder` is a checkpoint of DeepSpeed or torch.distributed.checkpoint, or a folder of DeepSpeed's."""
    return folder.is_dir() and (is_dcp_folder(folder) or is_zero_folder(folder))


def export_peer(
    folder: Path,
    out: Path | None,
    *,
    step: int | None,
    best: bool,
    model: str | None,
    dtype: str,
    max_shard_size: str,
    say: Callable[[str], None],
) -> Path:
    """Export the checkpoint in `folder` to `out` (FOLDER/hf where None) and return that folder.

    `step` chooses among DeepSpeed's global_step folders, else `latest` does. Raises as `export` does.
    """
    shard_bytes = parse_size(max_shard_size)
    if best:
        raise UserError(f"--best: cannot act, {folder} is no run of wikift and records no validation; leave it out")
    target = folder / "hf" if out is None else out
    found = _open_dcp(folder, step) if is_dcp_folder(folder) else _open_zero(choose_zero(folder, step))
    identity = {"name": folder.absolute().name, "kind": found.kind}
    check_target(target, identity, own=target.absolute() == (folder / "hf").absolute())
    record = {"format": FORMAT, "run": identity, "wikift": __version__, "step": found.facts.get("step"), "dtype": dtype}
    with stopping_by_exception(), published(target) as partial:
        weights, config = _write_model_files(found, model, partial, dtype)
        size = write_weights(weights, partial, dtype, shard_bytes, tied=config["tie_word_embeddings"])
        card = peer_card(target.absolute().parent.name, found.path.absolute().name, found.kind, found.facts, config)
        (partial / "README.md").write_text(card, encoding="utf-8")
        write_json(partial / folders.EXPORT_RECORD, record)
    say(f"{target}: {found.kind} checkpoint {found.path} as {dtype}, {show_bytes(size)} of weights")
    return target


def _open_zero(path: Path) -> _Found:
    opened = open_zero(path)
    names = plain_names([name for name in opened.weights.shapes if name not in opened.shared], path)
    return _Found("DeepSpeed", path, _renamed(opened.weights, names), opened.facts)


def _open_dcp(path: Path, step: int | None) -> _Found:
    if step is not None:
        raise UserError(f"--step {step}: cannot act, {path} is one checkpoint; name the checkpoint of that step")
    weights = open_dcp(path)
    return _Found("torch DCP", path, _renamed(weights, plain_names(list(weights.shapes), path)), {})


def _renamed(weights: Weights, names: dict[str, str]) -> Weights:
    shapes = {plain: weights.shapes[name] for plain, name in names.items()}
    return Weights(shapes, lambda plain: weights.pieces(names[plain]))


def _write_model_files(found: _Found, model: str | None, partial: Path, dtype: str) -> tuple[Weights, dict[str, Any]]:
    """Write config.json and the tokenizer; gives the weights in the model's order and the configuration."""
    sizes = dimensions(found.weights.shapes, found.path)
    with _model_folder(found, model, sizes) as (source, words):
        config = agreed_config(folders.read_json(source / "config.json"), sizes, words)
        if not any((source / name).is_file() for name in _TOKENIZER):
            raise UserError(f"{words}: has no tokenizer (tokenizer.json); name a model that has one: --model NAME|PATH")
        for name in _BESIDE:
            if (source / name).is_file():
                shutil.copyfile(source / name, partial / name)
    names, head = ordered_names(sizes["n_layer"]), HEAD in found.weights.shapes
    tied = config.get("tie_word_embeddings", True)
    if not tied and not head:
        raise UserError(f"{words}: says that the head is not tied, but {found.path} has no {HEAD}")
    if tied and head and not _same(found.weights, HEAD, _EMBEDDING):
        tied = False  # trained apart: the file is right about its own weights
    config |= {"architectures": ["GPT2LMHeadModel"], "dtype": dtype, "tie_word_embeddings": tied}
    config.pop("torch_dtype", None)  # transformers 4's name for it
    write_json(partial / "config.json", dict(sorted(config.items())))
    shapes = {name: found.weights.shapes[name] for name in (*names, *(() if tied else (HEAD,)))}
    return Weights(shapes, found.weights.pieces), config


@contextlib.contextmanager
def _model_folder(found: _Found, model: str | None, sizes: dict[str, int]) -> Iterator[tuple[Path, str]]:
    """A folder with a GPT-2's config.json and tokenizer, and how to call it in a message."""
    if model is None:
        above = [found.path.absolute(), *found.path.absolute().parents][:3]
        source = next((path for path in above if folders.is_model(path)), None)
        if source is None:
            known = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise UserError(
                f"{found.path}: no config.json in it or above it, and the weights ({known}) do not tell the number of "
                "heads nor the tokenizer; name the model that was trained: --model NAME|PATH"
            )
        yield source, str(source / "config.json")
    elif Path(model).is_dir():
        if folders.read_json(Path(model) / "config.json").get("model_type") != "gpt2":
            raise UserError(
                f"--model {model}: has no config.json of a gpt2 model; name a Hugging Face directory or a name"
            )
        yield Path(model), f"--model {model}"
    else:
        import tempfile

        from transformers import AutoTokenizer

        from wikift.model.gpt2 import explained, load_config, load_generation_config

        with tempfile.TemporaryDirectory() as folder:
            config = load_config(model)
            config.save_pretrained(folder)
            load_generation_config(model, config).save_pretrained(folder)
            with explained(model, "--model"):
                AutoTokenizer.from_pretrained(model).save_pretrained(folder)
            yield Path(folder), f"--model {model}"


def _same(weights: Weights, one: str, other: str) -> bool:
    """Whether two weights have the same bits."""
    if weights.shapes[one] != weights.shapes[other]:
        return False
    pairs = zip(weights.pieces(one), weights.pieces(other), strict=False)
    return all(np.array_equal(a.view(np.int32), b.view(np.int32)) for a, b in pairs)
