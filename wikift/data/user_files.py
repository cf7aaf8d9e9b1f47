"""Which files of the user's are the text: what `--dataset` names, by file, folder or pattern, once or several times.

All that a folder holds is used, or named as not used, or an error where it looks like a split.
"""

from __future__ import annotations

import contextlib
import difflib
import glob
import itertools
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wikift.base import hub
from wikift.base.errors import UserError
from wikift.base.files import content_of, parse_object, sha256_of
from wikift.base.names import WIKITEXT
from wikift.data.dataset_card import Patterns, choose, config_problem, configs_of
from wikift.data.open_file import TextFile, look_into, looks_like
from wikift.data.splits import KINDS, SPLITS, Candidate, candidates, gaps, is_beside, natural, plain, split_of

CHANGED = "changed while it was read; run the command again when nothing is writing to it"
UNREAD = (
    "wikift reads .txt, .md, .tokens, .jsonl, .json, .csv, .tsv, .parquet and .arrow, also in .gz, .bz2, .xz, .zst, "
    ".zip and .tar; unpack or convert it, or rename it to .txt if it is plain text"
)
_LISTED = 8
_LINK = "is a link to a file that is missing or not in the folder; copy the file there, or name it with --dataset"

Splits = dict[str, list[Candidate]]


@dataclass(frozen=True)
class UserFiles:
    """The files of each split, all of one kind, and what lies beside them unused."""

    kind: str
    config: str | None
    splits: Splits
    rows_are_documents: bool
    unused: Sequence[Candidate]

    def paths(self, split: str) -> list[Path]:
        """Of a split's files, an archive once."""
        return [path for path, _ in itertools.groupby(each.file.path for each in self.splits[split])]

    def listed(self, *, checksums: bool) -> dict[str, list[dict[str, Any]]]:
        """Name, size and time of each split's files, an archive once, and their SHA-256 where asked for."""
        return {split: [_describe(path, checksums) for path in self.paths(split)] for split in self.splits}

    def notes(self) -> list[str]:
        """What was read of which split, and what was not, unless there is one file only; and what is named oddly."""
        files = list(itertools.chain(*self.splits.values()))
        named: dict[str, Sequence[Candidate]] = {**self.splits, "not used": self.unused}
        notes = [f"{name}: {_names(each)}" for name, each in named.items() if each and (files[1:] or self.unused)]
        odd = ((each, looks_like(each.file.head)) for each in files if self.kind == "lines")
        as_text = "is read as plain text, as its name says; rename it if it is not"
        return notes + [f"{each.shown}: looks like {kind.upper()}, and {as_text}" for each, kind in odd if kind][:1]


def _describe(path: Path, checksum: bool) -> dict[str, Any]:
    about = path.stat()
    entry: dict[str, Any] = {"name": path.name, "bytes": about.st_size, "mtime_ns": about.st_mtime_ns}
    return {**entry, "sha256": sha256_of(path)} if checksum else entry


def _names(files: Sequence[Candidate]) -> str:
    names = [each.shown for each in files]
    more = f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def user_files(datasets: Sequence[str], config: str | None) -> UserFiles | None:
    """The files that `--dataset` and `--dataset-config` name, None where that is a name of the Hub.

    Reads names, each file's first bytes, a README.md's front matter. Raises UserError for what can't be a dataset.
    """
    where = " ".join(f"--dataset {name}" for name in datasets)
    if len(datasets) == 1 and not Path(datasets[0]).exists() and not glob.has_magic(datasets[0]):
        _must_be_hub_name(datasets[0], where)
        return None
    try:
        roots = [root for name in datasets for root in _roots(name)]
        path = roots[0][0]
        if len(roots) == 1 and (configs := configs_of(path / "README.md")):
            return files_of_card(path, configs, config, where)
        files = [each for root, named in roots for each in _files(root, named, alone=len(roots) == 1)]
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror}); fix its permissions") from None
    if len(roots) == 1 and path.is_file() and not files[0].file.member:
        made = _checked({"train": files}, None, where)
    else:
        groups = _configurations(files) if len(roots) == 1 else {}
        if groups:
            config = next(iter(groups)) if config is None and len(groups) == 1 else config
            if config not in groups:
                raise UserError(config_problem(config, list(groups)))
            files = groups[config]
        splits, unused = _by_split(files, where)
        one_by_one = {root for root, named in roots if named and root.is_file()}
        together = (each for each in files if each.file.member or each.file.path not in one_by_one)
        if problems := gaps(each for each in together if each.kind):
            raise UserError(*problems)
        made = _checked(splits, config if groups else None, where, unused)
    if config not in (None, made.config):
        raise UserError(f"--dataset-config {config}: has no effect, {path} has no configurations; omit it")
    return made


def _must_be_hub_name(dataset: str, where: str) -> None:
    if Path(plain(dataset)).suffix.lower() in KINDS or not hub.is_name(dataset):
        raise UserError(f"{where}: no such file or folder; fix the path")
    near = difflib.get_close_matches(dataset, (*WIKITEXT, "demo"), n=1, cutoff=0.75)
    if near and "/" not in dataset and dataset != "wikitext":  # the Hub knows it by this name too
        raise UserError(f"{where}: no such file, folder or dataset; did you mean {near[0]}?")


# --- what is there -----------------------------------------------------------------------------------------------


def _roots(name: str) -> list[tuple[Path, bool]]:
    """The files and folders that a word stands for, and whether it names them one by one."""
    path = Path(name)
    if path.exists():
        if not path.is_file() and not path.is_dir():
            raise UserError(f"--dataset {name}: is neither a file nor a folder; save the text in a file")
        if (path / "store.json").is_file():
            option = f"--data {shlex.quote(name)}"
            raise UserError(f"--dataset {name}: is a token store, not text; train and evaluate take it as {option}")
        return [(path, True)]
    matches = [Path(match) for match in sorted(glob.glob(name, recursive=True), key=natural)]
    if "**" in name or Path(name).suffix:  # in a pattern like *.txt a folder is none of them
        matches = [match for match in matches if match.is_file()]
    if not matches:
        rule = "no file matches; fix it" if glob.has_magic(name) else "no such file or folder; fix the path"
        alone = ", or name a dataset of the Hub, or the demo, alone" if hub.is_name(name) else ""
        raise UserError(f"--dataset {name}: {rule}{alone}")
    return [(match, False) for match in matches]


def _files(root: Path, named: bool, alone: bool) -> list[Candidate]:
    """All that is at `root`, whose own name tells nothing where it is `alone`. Raises UserError for a file not read."""
    if root.is_dir():
        files = list(_walk(root, () if alone else (root.name,), root))
    else:
        files = list(candidates(root, (root.name,), named=named))
        if named and len(files) == 1 and not files[0].kind:
            raise UserError(f"{root}: {UNREAD if look_into(root) else 'is an archive without files; name another'}")
        if alone:
            files = [replace(each, parts=each.parts[1:]) if each.file.member else each for each in files]
    if not named or alone or any(each.kind and split_of(each.parts) for each in files):
        return files
    return [replace(each, train=True) for each in files]


def _is_inside(path: Path, root: Path) -> bool:
    """Whether `path` is in the folder `root`, links followed; in the Hub's cache a snapshot has links to its blobs."""
    top = root.parents[1] if root.parent.name == "snapshots" else root
    return path.resolve().is_relative_to(top.resolve())


def _walk(folder: Path, parts: tuple[str, ...], root: Path) -> Iterator[Candidate]:
    saved = None  # the files of a folder of `save_to_disk`, which may have others in it
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        saved = [entry["filename"] for entry in parse_object(content_of(folder / "state.json"))["_data_files"]]
    if missing := [name for name in saved or () if not (folder / name).is_file()]:
        raise UserError(f"{folder}: {missing[0]} is missing, which its state.json names; copy or save it again")
    for path in sorted(folder.iterdir(), key=lambda path: natural(path.name)):
        name = (*parts, path.name)
        if path.is_symlink() and not (path.exists() and _is_inside(path, root)):
            yield Candidate(TextFile(path), name, "", reason=_LINK)
            continue
        loop = path.is_dir() and folder.resolve().is_relative_to(path.resolve())
        if (is_beside(path.name) and path.is_dir()) or loop or (saved and path.is_file() and path.name not in saved):
            yield Candidate(TextFile(path), name, "")
        elif path.is_dir():
            yield from _walk(path, name, root)
        elif path.is_file():
            yield from candidates(path, name)
        else:
            yield Candidate(TextFile(path), name, "")


def _configurations(files: Iterable[Candidate]) -> dict[str, list[Candidate]]:
    """The files of each subfolder that has splits, with all that are in none, where the folder itself has no splits."""
    groups: dict[str, list[Candidate]] = {}
    with_splits = set[str]()
    for each in files:
        folder = each.told[0] if len(each.told) > 1 and split_of((each.told[0], "")) is None else ""
        groups.setdefault(folder, []).append(each)
        if each.kind and split_of(each.told):
            with_splits.add(folder)
    if "" in with_splits:
        return {}
    beside = [each for name, of_group in groups.items() if name not in with_splits for each in of_group]
    return {name: groups[name] + beside for name in groups if name in with_splits}


def _by_split(files: Iterable[Candidate], where: str) -> tuple[Splits, list[Candidate]]:
    """The files of each split, and those of none. Raises UserError for what looks like a split and is not read."""
    splits: Splits = {}
    rest, unused, problems = list[Candidate](), list[Candidate](), list[str]()
    for each in files:
        if not each.kind and any(map(is_beside, each.told)):
            unused.append(each)
            continue
        try:
            split = split_of(each.told) or ("train" if each.train else None)
        except UserError as error:
            problems += error.problems
            continue
        if not each.kind and split:
            problems.append(f"{each.file}: {each.reason or f'looks like {split} text, and {UNREAD}'}")
        elif each.kind and split:
            splits.setdefault(split, []).append(each)
        else:
            (rest if each.kind else unused).append(each)
    if rest and splits and "train" not in splits:
        problems.append(f"{where}: has {' and '.join(splits)} but no train; name it train.*: {rest[0].shown}?")
    elif not splits and not rest and not problems:
        problems.append(f"{where}: has no text (there: {_names(unused) or 'nothing'}); {UNREAD}")
    if problems:
        raise UserError(*problems)
    if not splits:
        return {"train": rest}, unused
    return {split: splits[split] for split in SPLITS if split in splits}, rest + unused


def files_of_card(folder: Path, configs: dict[str, Patterns], config: str | None, where: str) -> UserFiles:
    config, patterns = choose(configs, config)
    splits: Splits = {}
    for split, each in patterns.items():
        paths = set[Path]()
        with contextlib.suppress(ValueError, NotImplementedError):  # no pattern at all
            matches = (path for pattern in each for path in folder.glob(pattern))
            paths = {path for path in matches if path.is_file() and _is_inside(path, folder)}
        if not paths:
            names = ", ".join(each)
            raise UserError(f"{where}: README.md names files that are not in the folder ({names}); download it again")
        splits[split] = [
            candidate
            for path in sorted(paths, key=lambda path: natural(str(path)))
            for candidate in candidates(path, (path.name,), named=True)
        ]
    if problems := gaps(itertools.chain(*splits.values())):
        raise UserError(*problems)
    made = _checked(splits, config, where)
    return replace(made, rows_are_documents=made.rows_are_documents and not set(configs) & set(WIKITEXT))


def _checked(splits: Splits, config: str | None, where: str, unused: Sequence[Candidate] = ()) -> UserFiles:
    """The files as one kind. Raises UserError for mixed kinds, Git LFS pointers, and a text that is there twice."""
    files = list(itertools.chain(*splits.values()))
    problems = [f"{each.file}: {UNREAD}" for each in files if not each.kind]
    kinds = {each.kind: each for each in reversed(files) if each.kind}
    if pointer := kinds.pop("pointer", None):
        problems.append(
            f"{pointer.file}: is a Git LFS pointer, not the file; fetch it with git lfs pull, or download it"
        )
    if len(kinds) > 1:
        mixed = ", ".join(f"{kind} in {each.shown}" for kind, each in kinds.items())
        some = shlex.quote(str(files[0].file.path.parent / f"*{files[0].file.path.suffix}"))
        way = "unpacked" if files[0].file.member else f"say --dataset {some}"
        problems.append(f"{where}: mixes kinds of files ({mixed}); name those of one kind, {way}")
    first: dict[tuple[str, str, bytes], Candidate] = {}
    for split, each in ((split, each) for split, of_split in splits.items() for each in of_split if each.file.head):
        other = first.setdefault((split, plain(each.parts[-1]), each.file.head), each)
        sizes = {other.file.size, each.file.size}
        if other is not each and (len(sizes) == 1 or None in sizes):
            problems.append(f"{where}: has the same text twice, {other.file} and {each.file}; remove or name one")
    if problems:
        raise UserError(*problems)
    known = [name for name in WIKITEXT if name in files[0].file.path.absolute().parts[-5:]]
    (kind,) = kinds
    return UserFiles(kind, config or next(iter(known), None), splits, kind != "lines" and not known, unused)
