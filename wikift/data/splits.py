"""Which of the files that lie there are text, of which kind, and of which split: by their names, else by looking."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from wikift.base.errors import UserError
from wikift.base.files import LFS_POINTER
from wikift.data.open_file import TextFile, is_text, look_into, looks_like

SPLITS = ("train", "validation", "test")

KINDS = {
    **dict.fromkeys((".txt", ".text", ".md", ".markdown", ".tokens", ".raw"), "lines"),
    **dict.fromkeys((".json", ".jsonl", ".jsonlines", ".ndjson"), "json"), ".csv": "csv", ".tsv": "csv",
    ".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow",
}  # fmt: skip
_PACKED = re.compile(r"\.(gz|bz2|xz|lzma|zst|zstd|lz4|zip|tar|tgz|tbz2|txz)$", re.IGNORECASE)
_ENDING = re.compile(r"\.(?=[0-9]*[a-z])[a-z0-9]{1,8}$", re.IGNORECASE)
_LETTER = r"[^\W\d_]"
_SPLIT = re.compile(  # as `datasets` has them, save that eval is validation
    rf"(?<!{_LETTER})(?:(?P<train>train(ing)?)|(?P<validation>validation|valid|val|dev|eval(uation)?)|"
    rf"(?P<test>test(ing)?))(?!{_LETTER})",
    re.IGNORECASE,
)
_BESIDE = re.compile(  # what lies beside data and is no part of it
    r"[.].*|__.*|(readme|licen[sc]e|copying|notice|citation|authors|changelog|contributing)([-_.][a-z]{1,8})*|"
    r"thumbs\.db|desktop\.ini|_success|(state|config|metadata|dataset_infos?|dataset_dict|croissant)\.json|"
    r"cache-.*\.arrow|.*~|.*\.(py|pyc|sh|ipynb|ya?ml|toml|cfg|ini|log|lock|md5|sha\d+|crc|idx)",
    re.IGNORECASE,
)
_SHARD = re.compile(r"(.*?)(\d+)[-_]of[-_](\d+)(.*)")


@dataclass(frozen=True)
class Candidate:
    """A file by its folders and name as the user sees them; of no `kind` where it is not read, for a `reason`."""

    file: TextFile
    parts: tuple[str, ...]
    kind: str
    train: bool = False  # whether it is named for train where its name tells no split
    reason: str = ""

    @property
    def shown(self) -> str:
        return "/".join(self.parts)

    @property
    def told(self) -> tuple[str, ...]:
        """The parts that tell the split: without the folder `data` of the Hub's layout."""
        return self.parts[1:] if self.parts[0] == "data" and len(self.parts) > 1 else self.parts


def candidates(path: Path, parts: tuple[str, ...], *, named: bool = False) -> Iterator[Candidate]:
    """The file at `path`, which the user sees as `parts`, or the members of the archive that it is.

    One that is not `named` may be no text though its ending says so, as README.md.
    """
    if (not named and is_beside(path.name)) or not _may_be_text(path.name):
        yield Candidate(TextFile(path), parts, "")
        return
    files = look_into(path)
    if not files:  # an archive with nothing in it
        yield Candidate(TextFile(path), parts, "")
    for file in files:
        beside = any(map(is_beside, file.parts[1:]))
        yield Candidate(file, parts + file.parts[1:], "" if beside else _kind(file))


def is_beside(name: str) -> bool:
    """Whether a file or folder of this name is no data: hidden, a README, a program."""
    return _BESIDE.fullmatch(name) is not None


def natural(name: str) -> list[tuple[int, str]]:
    """Sorts book2 before book10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def plain(name: str) -> str:
    """The name without endings of compression and archives."""
    return plain(name[: match.start()]) if (match := _PACKED.search(name)) else name


def _may_be_text(name: str) -> bool:
    ending = _ENDING.search(plain(name))
    return ending is None or ending[0].lower() in KINDS or _SPLIT.fullmatch(ending[0][1:]) is not None


def _kind(file: TextFile) -> str:
    name, head = plain(file.parts[-1]), file.head
    if not _may_be_text(name) or head.startswith(b"PK\3\4"):
        return ""
    for magic, kind in ((b"PAR1", "parquet"), (b"ARROW1", "arrow"), (LFS_POINTER, "pointer")):
        if head.startswith(magic):
            return kind
    if (ending := _ENDING.search(name)) and (known := KINDS.get(ending[0].lower())):
        return known
    return looks_like(head) or ("lines" if is_text(head) else "")


# --- splits ------------------------------------------------------------------------------------------------------


def split_of(parts: Sequence[str]) -> str | None:
    """The split that a file's folders and name tell: those that are such a word and nothing else, or have it in them.

    Raises UserError where they tell two.
    """
    *folders, name = parts
    name = plain(name)
    stem = _ENDING.sub("", name)
    exact = [match for part in (*folders, stem) if (match := _SPLIT.fullmatch(part))]
    matches = exact or [match for part in (*folders, name) for match in _SPLIT.finditer(part)]
    splits = {split: match[0] for match in matches for split in SPLITS if match[split]}
    if len(splits) > 1:
        raise UserError(f"{'/'.join(parts)}: is named {' and '.join(splits.values())}; rename it for one split")
    return next(iter(splits), None)


def gaps(files: Iterable[Candidate]) -> list[str]:
    """The problems of numbered files (00001-of-00005) of which some are missing."""
    numbers: dict[tuple[str, str, str], set[int]] = {}
    for file in files:
        if match := _SHARD.fullmatch(file.shown):
            before, number, count, after = match.groups()
            after = re.sub("-[0-9a-f]{8,}", "", after)  # of `push_to_hub`: a hash of the content
            numbers.setdefault((before, count, after), set()).add(int(number))
    problems = []
    for (before, count, after), present in numbers.items():
        first = 0 if 0 in present else 1
        if missing := sorted({*range(first, first + int(count))} - present)[:8]:
            names = ", ".join(f"{before}{number:0{len(count)}}-of-{count}{after}" for number in missing)
            problems.append(
                f"{names}: missing, of {count}; download it again, or name each unpacked file with --dataset"
            )
    return problems
