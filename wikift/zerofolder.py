"""DeepSpeed's ZeRO checkpoints, read without DeepSpeed: the fp32 master weights, in pieces.

    FOLDER/latest                                                  the name of the newest
    FOLDER/global_step100/mp_rank_00_model_states.pt               names and shapes (ZeRO-3: zero_pp_rank_N_...)
    FOLDER/global_step100/[bf16_]zero_pp_rank_N_mp_rank_00_optim_states.pt   rank N's share of the masters and moments

ZeRO 1 and 2 lay a group's parameters end to end and cut that into ranks; ZeRO-3 cuts every parameter into ranks and
lays the shares end to end (deepspeed/utils/zero_to_fp32.py says the same in code).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from wikift.base.errors import UserError
from wikift.export.weights import PIECE, Piece, Weights
from wikift.standin import damaged, load_torch

if TYPE_CHECKING:
    from torch import Tensor

_ALLOWED = ("deepspeed.", "numpy.", "argparse.Namespace", "pathlib.")
_SHARE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_MAPPED_BYTES = 64 << 20


class _Range(NamedTuple):
    file: int
    tensor: int  # the number of the flat tensor in the file
    start: int
    stop: int


class ZeroCheckpoint(NamedTuple):
    """`weights` by the names that they have in the file; `shared`: another name of one of them."""

    weights: Weights
    shared: dict[str, str]
    facts: dict[str, Any]


def is_zero_folder(folder: Path) -> bool:
    """Whether `folder` is what DeepSpeed's save_checkpoint made, or one checkpoint in it."""
    return _is_one(folder) or (folder / "latest").is_file() or any(map(_is_one, folder.glob("global_step*")))


def choose_zero(folder: Path, step: int | None) -> Path:
    """The folder of one checkpoint: of `step`, else what `latest` names. Raises UserError where it is not there."""
    if _is_one(folder):
        if step is not None:
            raise UserError(f"--step {step}: cannot act, {folder} is one checkpoint; name the folder above")
        return folder
    found = sorted((p.name for p in folder.iterdir() if _is_one(p)), key=lambda name: (len(name), name))
    there = f"there are {', '.join(found)}" if found else "there is none"
    if step is not None:
        if f"global_step{step}" not in found:
            raise UserError(f"--step {step}: {folder} has no global_step{step}; {there}")
        return folder / f"global_step{step}"
    try:
        tag = (folder / "latest").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{folder}: has no file `latest` to say which checkpoint; {there}; name one") from None
    if tag not in found:
        raise UserError(f"{folder / 'latest'}: names {tag[:80]!r}, which is no checkpoint here; {there}; name one")
    return folder / tag


def open_zero(folder: Path) -> ZeroCheckpoint:
    """Open one checkpoint. Raises UserError where a rank's file is missing or damaged, or it is none of ZeRO 1 to 3."""
    shares, models = _rank_files(folder, _SHARE), _rank_files(folder, _MODEL)
    if not models:
        raise UserError(f"{folder}: has no *_model_states.pt; the checkpoint is not whole")
    if not shares:
        raise UserError(
            f"{folder}: has no *_optim_states.pt, which hold the fp32 weights; only ZeRO 1, 2 and 3 are read"
        )
    try:
        model = load_torch(models[0], _ALLOWED)
        states = load_torch(shares[0], _ALLOWED)["optimizer_state_dict"]
        key = "fp32_flat_groups" if "fp32_flat_groups" in states else "single_partition_of_fp32_groups"
        count = states["partition_count"]
        ranks = max(count) if isinstance(count, list) else int(count)
        groups = model["param_shapes"]
        groups = [dict(group) for group in (groups if isinstance(groups, list) else [groups])]
        frozen = dict(model.get("frozen_param_shapes") or {})
        paddings = states.get("param_alignment_paddings")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(folder, f"not what DeepSpeed writes, {type(error).__name__} {error}") from None
    if ranks != len(shares):
        raise UserError(
            f"{folder}: has {len(shares)} *_optim_states.pt, {ranks} ranks wrote it; the checkpoint is not whole"
        )

    def flats(file: int) -> list[Tensor]:
        if file < 0:
            fragments = load_torch(models[-1 - file], _ALLOWED)["frozen_param_fragments"]
            return [fragments[name].detach().reshape(-1) for name in frozen]
        found = load_torch(shares[file], _ALLOWED)["optimizer_state_dict"][key]
        return [flat.detach().reshape(-1) for flat in found]

    sharded = key == "fp32_flat_groups"
    try:
        lengths = [[flat.numel() for flat in flats(rank)] for rank in range(ranks)]
        ranges = _cut_by_rank(groups, lengths) if sharded else _cut_end_to_end(groups, lengths, paddings)
        ranges |= _frozen(frozen, len(models) if sharded else 1)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise damaged(folder, f"its shares do not fit its shapes, {error}") from None
    shapes = {name: tuple(shape) for group in groups for name, shape in group.items()}
    shapes |= {name: tuple(shape) for name, shape in frozen.items()}
    stage = _stage(getattr(states.get("zero_stage"), "given", ()), sharded)
    facts = {
        "ZeRO stage": stage,
        "ranks": ranks,
        "DeepSpeed": str(model.get("ds_version")),
        "step": model.get("global_steps"),
    }
    return ZeroCheckpoint(Weights(shapes, _Mapped(flats, ranges).pieces), dict(model.get("shared_params") or {}), facts)


def _stage(given: tuple[Any, ...], sharded: bool) -> int | str:
    """The stage of a pickled member of DeepSpeed's ZeroStageEnum: its value, or its name as Python 3.11.0 wrote it."""
    names = {"optimizer_states": 1, "gradients": 2, "weights": 3}
    stage = names.get(given[-1], given[-1]) if given else None
    return stage if isinstance(stage, int) else 3 if sharded else "1 or 2"


class _Mapped:
    """Reads mapped files; all are mapped anew after every 64 MiB, so that the pages read do not stay resident."""

    def __init__(self, flats: Callable[[int], list[Tensor]], ranges: dict[str, list[_Range]]) -> None:
        self.flats, self.ranges = flats, ranges
        self.open: dict[int, list[Tensor]] = {}
        self.touched = 0

    def pieces(self, name: str) -> Iterator[Piece]:
        for part in self.ranges[name]:
            for low in range(part.start, part.stop, PIECE):
                high = min(low + PIECE, part.stop)
                self.touched += 4 * (high - low)
                if self.touched > _MAPPED_BYTES:
                    self.open.clear()
                    self.touched = 4 * (high - low)
                if part.file not in self.open:
                    self.open[part.file] = self.flats(part.file)
                yield self.open[part.file][part.tensor][low:high].float().numpy()


def _is_one(folder: Path) -> bool:
    return any(_SHARE.fullmatch(p.name) or _MODEL.fullmatch(p.name) for p in folder.glob("*_states.pt"))


def _rank_files(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    """The files by rank. Raises UserError where one is missing, double, or of tensor parallelism."""
    found: dict[int, Path] = {}
    for path in sorted(folder.glob("*_states.pt")):
        match = pattern.fullmatch(path.name)
        if match is None:
            continue
        if int(match[2]):
            raise UserError(f"{path}: is of tensor parallelism (mp_rank {match[2]}); only ZeRO 1, 2 and 3 are read")
        rank = int(match[1] or 0)
        if rank in found:
            raise UserError(
                f"{folder}: holds both {found[rank].name} and {path.name}; two runs wrote into it, remove one"
            )
        found[rank] = path
    missing = sorted(set(range(len(found))) - set(found))
    if missing:
        raise UserError(f"{folder}: the file of rank {missing[0]} beside {next(iter(found.values())).name} is missing")
    return [found[rank] for rank in sorted(found)]


def _within(lengths: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Where [start, stop) of tensors laid end to end lies: (which, from, to)."""
    offset = 0
    for number, length in enumerate(lengths):
        low, high = max(start, offset), min(stop, offset + length)
        if low < high:
            yield number, low - offset, high - offset
        offset += length
    if stop > offset:
        raise ValueError(f"{offset} numbers where {stop} are needed")


def _cut_end_to_end(
    groups: list[dict[str, Any]], lengths: list[list[int]], paddings: list[list[int]] | None
) -> dict[str, list[_Range]]:
    ranges = {}
    for number, group in enumerate(groups):
        shares, offset = [rank[number] for rank in lengths], 0
        gaps = paddings[number] if paddings else [0] * len(group)
        for (name, shape), gap in zip(group.items(), gaps, strict=True):
            stop = offset + math.prod(shape)
            ranges[name] = [_Range(rank, number, low, high) for rank, low, high in _within(shares, offset, stop)]
            offset = stop + gap
        align = 2 * len(shares)  # DeepSpeed fills a group up to a multiple of this
        if -(-offset // align) != -(-sum(shares) // align):
            raise ValueError(f"{sum(shares)} numbers where {offset} are needed")
    return ranges


def _cut_by_rank(groups: list[dict[str, Any]], lengths: list[list[int]]) -> dict[str, list[_Range]]:
    ranges, offset, ranks = {}, 0, len(lengths)
    for name, shape in ((name, shape) for group in groups for name, shape in group.items()):
        count = math.prod(shape)
        share = -(-count // ranks)
        ranges[name] = [
            _Range(rank, tensor, low, high)
            for rank in range(ranks)
            for tensor, low, high in _within(lengths[rank], offset, offset + max(0, min(share, count - rank * share)))
        ]
        offset += share
    if any(sum(rank) != offset for rank in lengths):
        raise ValueError(f"{max(map(sum, lengths))} numbers a rank where {offset} are needed")
    return ranges


def _frozen(shapes: dict[str, Any], files: int) -> dict[str, list[_Range]]:
    """Weights that were not trained lie in the model's files (counted -1, -2 ...), whole or a share in each."""
    ranges = {}
    for number, (name, shape) in enumerate(shapes.items()):
        count = math.prod(shape)
        share = -(-count // files)
        parts = [max(0, min(share, count - file * share)) for file in range(files)]
        ranges[name] = [_Range(-1 - file, number, 0, part) for file, part in enumerate(parts) if part]
    return ranges
