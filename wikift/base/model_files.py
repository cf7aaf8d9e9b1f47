"""A Hugging Face model as its files tell it, without torch: its shape, its weights by their headers, or what to do.

`train` (and its --dry-run), `evaluate` and `generate` all look here, so that what one of them refuses no other takes.
"""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from wikift.base import hub
from wikift.base.command import command_line
from wikift.base.conversions import save_again, way_out
from wikift.base.errors import UserError, one_line
from wikift.base.files import content_of, is_lfs_pointer, parse_object, read_json, sha256_of
from wikift.base.names import EXPORT_RECORD
from wikift.base.shape import EMBEDDING, HEAD, Shape, released_shape, shape_of_config
from wikift.base.tensorfile import ITEM_BYTES, read_header

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_COMPARED_BYTES = 1 << 20
# torch.compile and FSDP put these inside a name; before it may be whatever wrapped the model
_INSIDE = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_NAME = re.compile(r"(.*?)(?:transformer\.)?((?:wte|wpe|ln_f|h\.\d+)\..+|lm_head\.weight)")
_BUFFER = re.compile(r"transformer\.h\.\d+\.attn\.(masked_)?bias")  # the causal mask, which old files hold
Header = dict[str, tuple[str, tuple[int, ...], int]]  # of a safetensors file, as read_header returns it


class Stored(NamedTuple):
    """A tensor in a safetensors file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes


class ModelFiles(NamedTuple):
    """A model's shape, tied or not as transformers 5 reads it; its tensors by name; what a user should know of them."""

    shape: Shape
    stored: dict[str, Stored]
    notes: list[str]


def shape_of(model: str, setting: str = "--model", *, fetched: bool = False) -> Shape | None:
    """The shape of a model folder by its config.json; of a released one by its name, or by config.json where `fetched`.

    None where the Hub must tell. Raises UserError where there is no GPT-2 that wikift can read.
    """
    if fetched:
        return _read_config(model, hub.fetch(model, setting, hub.CONFIG), setting)
    return _read_config(model, Path(model), setting) if Path(model).exists() else released_shape(model)


def open_model(model: str, setting: str = "--model", *, download: bool = True) -> ModelFiles:
    """A model's files, all of them checked as far as their headers tell. One of the Hub is downloaded first.

    Without `download` the Hub is asked for the headers alone; a head is then taken for tied where config.json ties it.
    Raises UserError where files are missing, damaged, or not exactly those of the model that config.json describes.
    """
    where, notes = f"{setting} {model}", list[str]()
    folder, local = Path(model), Path(model).exists()
    for files in () if local else (hub.CONFIG, hub.WEIGHTS) if download else (hub.CONFIG,):
        folder = hub.fetch(model, setting, files)
    shape = _read_config(model, folder, setting)
    here = local or download or any(folder.glob("*.safetensors"))
    headers = _headers(model, folder, where) if here else _headers_on_the_hub(model, where)
    stored, unexpected, removed = _by_name(headers, {*shape.tensors, HEAD})
    if removed:
        notes.append(f"{where}: removed {', '.join(removed)} from the names of its weights")
    if shape.tie_word_embeddings and HEAD in stored:
        head = stored.pop(HEAD)
        if not _same(head, stored.setdefault(EMBEDDING, head)):
            notes.append(f"{where}: {HEAD} is not the embedding, so that it is not tied to it as config.json says")
            shape, stored[HEAD] = replace(shape, tie_word_embeddings=False), head
    tensors, which = shape.tensors, headers[0][0].name if len(headers) == 1 else "its safetensors files"
    missing = [key for key in tensors if key not in stored]
    wrong = [
        f"{key} is {s.dtype} {list(s.shape)} and not F32, F16 or BF16 {list(tensors[key])}"
        for key, s in stored.items()
        if s.shape != tensors[key] or s.dtype not in ITEM_BYTES
    ]
    problems = [f"lacks {_few(missing)}; copy or download it again"] if missing else []
    if unexpected:  # transformers would not know a prefix, and draw random weights
        remove = f"; to remove that: {save_again(folder)}" if not missing and not removed else ""
        problems.append(f"holds what a GPT-2 has not: {_few(unexpected)}{remove}")
    if wrong:
        problems.append(f"does not fit config.json: {_few(wrong)}; fix the one that is wrong")
    if problems:
        raise UserError(*(f"{where}: {which} {problem}" for problem in problems))
    return ModelFiles(shape, stored, notes)


def check_exported(model: str, setting: str = "--model") -> None:
    """Raises UserError where a file of the folder `model` is not as `consolidate` wrote it; others have no record."""
    if (name := changed_file(Path(model))) is not None:
        raise UserError(
            f"{setting} {model}: {name} has changed since it was exported; make the folder again "
            f"({command_line('consolidate')}), or remove its {EXPORT_RECORD} if it was changed on purpose"
        )


def changed_file(folder: Path) -> str | None:
    """The first file of a folder that is not as it was when the folder's record was written; a missing one is none."""
    files = read_json(folder / EXPORT_RECORD).get("files")
    for name, sha256 in files.items() if isinstance(files, dict) else ():
        file = folder / Path(name).name
        if file.is_file() and sha256_of(file) != sha256:
            return str(name)
    return None


def _read_config(model: str, folder: Path, setting: str) -> Shape:
    path, where = folder / "config.json", f"{setting} {model}"
    try:
        config = parse_object(content_of(path))
    except (FileNotFoundError, NotADirectoryError):
        raise _lacking(model, folder, where, "config.json") from None
    except (OSError, ValueError) as error:
        raise _unreadable(path, where, error) from None
    if "wikift" in config:
        command = f"{command_line('consolidate')} {shlex.quote(model)}"
        raise UserError(f"{where}: is a run; make a model of it ({command}) and name {folder / 'hf'}")
    return shape_of_config(config, where)


def _headers(model: str, folder: Path, where: str) -> list[tuple[Path, Header]]:
    index, files = folder / INDEX, [folder / SINGLE]
    if not files[0].exists():
        if not index.exists():
            raise _lacking(model, folder, where, SINGLE)
        try:
            names = sorted(set(parse_object(content_of(index))["weight_map"].values()))
            if outside := [name for name in names if Path(name).name != name]:
                raise ValueError(f"it names {outside[0]!r}, which is no file of the folder")
            files = [folder / name for name in names]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _unreadable(index, where, error) from None
    if missing := [file.name for file in files if not file.exists()]:
        command = shlex.join(["hf", "download", "OWNER/NAME", *missing, "--local-dir", str(folder)])
        raise UserError(f"{where}: {INDEX} names files that are missing: {_few(missing)}; copy them, or {command}")
    headers = []
    for file in files:
        try:
            headers.append((file, read_header(file)[0]))
        except (OSError, ValueError) as error:
            raise _unreadable(file, where, error) from None
    return headers


def _headers_on_the_hub(model: str, where: str) -> list[tuple[Path, Header]]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError

    try:
        files = HfApi().get_safetensors_metadata(model.partition("@")[0], revision=hub.commits[model]).files_metadata
    except NotASafetensorsRepoError:
        raise _lacking(model, Path(model), where, SINGLE) from None
    except Exception as error:
        raise hub.failure(error, where, "a folder") from None
    return [
        (Path(name), {own: (t.dtype, tuple(t.shape), 0) for own, t in file.tensors.items()})
        for name, file in files.items()
    ]


def _by_name(headers: list[tuple[Path, Header]], names: set[str]) -> tuple[dict[str, Stored], list[str], list[str]]:
    """Tensors by the model's `names`; what else the files hold, by its own name; what was removed from names."""
    stored, unexpected, removed = dict[str, Stored](), list[str](), set[str]()
    for file, header in headers:
        for own, entry in header.items():
            match = _NAME.fullmatch(_INSIDE.sub("", own))
            prefix, key = match.groups() if match else ("", own)
            if match and key != HEAD:
                key = f"transformer.{key}"  # the Hub's gpt2 is saved without its head, and without this
            if key in names and key not in stored:
                stored[key] = Stored(file, *entry)
                removed |= {prefix, *(inner[0] for inner in _INSIDE.finditer(own))}
            elif not _BUFFER.fullmatch(key):
                unexpected.append(own)
    return stored, unexpected, sorted(removed - {""})


def _same(one: Stored, other: Stored) -> bool:
    """Whether two tensors are the same, byte for byte; those that are still on the Hub are taken for it."""
    if one[1:3] != other[1:3] or one == other or not one.file.exists():
        return one[1:3] == other[1:3]
    count = math.prod(one.shape) * ITEM_BYTES.get(one.dtype, 0)
    with open(one.file, "rb") as left, open(other.file, "rb") as right:
        left.seek(one.offset)
        right.seek(other.offset)
        sizes = (min(_COMPARED_BYTES, count - start) for start in range(0, count, _COMPARED_BYTES))
        return all(left.read(size) == right.read(size) for size in sizes)


def _unreadable(path: Path, where: str, error: Exception) -> UserError:
    if is_lfs_pointer(path):
        pull = f"git -C {shlex.quote(str(path.parent))} lfs pull"
        return UserError(f"{where}: {path.name} is a Git LFS pointer, not the file; run: {pull}")
    return UserError(f"{where}: {path.name} cannot be read ({one_line(error)}); copy or download it again")


def _lacking(model: str, folder: Path, where: str, file: str) -> Exception:
    """What to raise where `file` is not in the folder: the command that helps, by what is there instead."""
    if not Path(model).exists():  # of the Hub
        name = model.partition("@")[0]
        command = f"hf download {name} --local-dir {name.rpartition('/')[2]}"
        return UserError(f"{where}: has no {file} on the Hub; get what it has ({command}) and name that folder")
    is_file = folder.is_file()
    files = [folder] if is_file else sorted(path for path in folder.iterdir() if path.is_file())
    folder = folder.parent if is_file else folder
    if (text := way_out(folder, files)) is not None:
        return UserError(f"{where}: {text}")
    if is_file:
        return UserError(f"{where}: is a file; name its folder")
    weights = [path.name for path in files if path.suffix == ".safetensors"]
    if file == SINGLE and len(weights) == 1 and "-of-" not in weights[0]:
        move = shlex.join(["mv", str(folder / weights[0]), str(folder / SINGLE)])
        return UserError(f"{where}: its weights are not in {SINGLE}; run: {move}")
    if file == SINGLE and weights:
        return UserError(f"{where}: has {_few(weights)} without {INDEX}; copy or download that too")
    listed = _few([path.name for path in files]) or "nothing"
    return UserError(f"{where}: has no {file} (there: {listed}); name a Hugging Face model folder, RUN/hf or gpt2")


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
