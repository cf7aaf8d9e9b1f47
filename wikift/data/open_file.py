"""Any file as a stream of text: compressed or not, in an archive or not, in the encoding that its bytes show.

Compression and archives are known by their first bytes and not by their names. Members of an archive are read one after
the other, in its order, and never written to the disk.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import itertools
import lzma
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from wikift.base.errors import UserError, one_line

BLOCK_BYTES = 1 << 20
_HEAD_BYTES = 1 << 12
_MARKS = {  # the longer first
    codecs.BOM_UTF32_LE: "utf-32-le", codecs.BOM_UTF32_BE: "utf-32-be", codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be",
}  # fmt: skip
_PROPOSED = ("cp1252", "cp1250", "cp1251", "cp1253", "koi8_r", "gb18030", "big5", "shift_jis", "euc_jp", "euc_kr")
_DAMAGED = (EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile, ValueError, OSError)


@dataclass(frozen=True)
class TextFile:
    """A file of the user's or a member of an archive: its first bytes, and its size where it is not compressed."""

    path: Path
    member: str = ""
    head: bytes = field(default=b"", compare=False, repr=False)
    size: int | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return f"{self.path}/{self.member}" if self.member else str(self.path)

    @property
    def parts(self) -> tuple[str, ...]:
        """The name of the file, and in an archive the member's folders and name after it."""
        return (self.path.name, *PurePosixPath(self.member).parts)

    @property
    def in_place(self) -> bool:
        """Whether the bytes at `path` are the content."""
        return not self.member and self.size is not None


def look_into(path: Path) -> list[TextFile]:
    """The file at `path`, or the members of the archive at `path`, none of them read but for the first bytes."""
    with faults(path):
        return [TextFile(path, name, stream.read(_HEAD_BYTES), size) for name, size, stream in _members(path)]


def streams(files: Sequence[TextFile]) -> Iterator[tuple[TextFile, Any]]:
    """Each file with its content as a stream of bytes, which is closed when the next one is asked for."""
    for path, group in itertools.groupby(files, lambda file: file.path):
        wanted = {file.member: file for file in group}
        for name, _, stream in _members(path):
            if name in wanted:
                yield wanted[name], stream


@contextlib.contextmanager
def faults(file: TextFile | Path) -> Iterator[None]:
    """Turns what reading a damaged file raises into a UserError; errors of the system remain but for missing files."""
    try:
        yield
    except (FileNotFoundError, PermissionError) as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); fix the name or the permissions") from None
    except (RuntimeError, NotImplementedError) as error:  # of zipfile: encrypted, or compressed by a method of its own
        raise UserError(f"{file}: cannot be unpacked here ({one_line(error)}); unpack it and name the folder") from None
    except _DAMAGED as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{file}: is damaged or incomplete ({one_line(error)}); copy or download it again") from None


def _members(path: Path) -> Iterator[tuple[str, int | None, Any]]:
    """(name, bytes where known, content) of each file in an archive; of any other file the one, without a name."""
    with open(path, "rb") as file, _decompressed(file) as stream:
        if file.peek(4)[:4] in (b"PK\3\4", b"PK\5\6"):
            with zipfile.ZipFile(path) as archive:
                for info in archive.infolist():
                    if not info.is_dir():
                        with archive.open(info) as member, _decompressed(member) as content:
                            yield info.filename, info.file_size if content is member else None, content
        elif stream.peek(512)[257:262] == b"ustar":
            with tarfile.open(fileobj=stream, mode="r|") as packed:
                for entry in packed:
                    if entry.issym() or entry.islnk():
                        raise UserError(
                            f"{path}: {entry.name} is a link, and links in an archive are not read; unpack it and name "
                            "the folder"
                        )
                    if entry.isfile():
                        inner: Any = packed.extractfile(entry)
                        with _decompressed(inner) as content:
                            yield entry.name, entry.size if content is inner else None, content
        else:
            yield "", path.stat().st_size if stream is file else None, stream


def _decompressed(stream: Any) -> Any:
    """`stream` itself, or what is compressed in it, once or more."""
    head = stream.peek(10)[:10]
    if head.startswith(b"\x1f\x8b\x08"):
        return _decompressed(gzip.GzipFile(fileobj=stream, mode="rb"))
    if re.match(rb"BZh[1-9]1AY&SY", head):
        return _decompressed(bz2.BZ2File(stream))
    if head.startswith((b"\xfd7zXZ\0", b"\x5d\0\0")):
        return _decompressed(lzma.LZMAFile(stream))
    for magic, name in ((b"\x28\xb5\x2f\xfd", "zstd"), (b"\x04\x22\x4d\x18", "lz4")):
        if head.startswith(magic):
            import io

            import pyarrow as pa

            return _decompressed(io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(stream, "r"), name)))
    return stream


# --- bytes to text -----------------------------------------------------------------------------------------------


def decoded(file: TextFile, stream: Any, encoding: str | None) -> Iterator[str]:
    """The text of `stream` in blocks, without a byte-order mark; `encoding` holds where there is no mark."""
    block = stream.read(BLOCK_BYTES)
    name = _marked(block) or encoding or _unmarked_utf16(block[:_HEAD_BYTES]) or "utf-8"
    decoder = codecs.getincrementaldecoder(name)("strict")
    offset, line, text, first = 0, 1, "", True
    while True:
        try:
            text = decoder.decode(block, not block)
        except UnicodeDecodeError as error:
            data = error.object
            line += data[: error.start].decode(name, "replace").count("\n")
            at = offset + len(block) - len(data) + error.start
            raise UserError(
                f"{file}, line {line}: byte 0x{data[error.start]:02x} at offset {at:,} is not {name.upper()}; "
                f"{_proposal(data, error.start, name)}"
            ) from None
        except UnicodeError as error:  # UTF-16 and UTF-32, asked for without their mark
            raise UserError(f"{file}: is not {name.upper()} ({error}); omit --encoding, or name another") from None
        yield text.removeprefix("\ufeff") if first else text
        line, offset, first = line + text.count("\n"), offset + len(block), first and not text
        if not block:
            return
        block = stream.read(BLOCK_BYTES)


def _marked(head: bytes) -> str | None:
    return next((name for mark, name in _MARKS.items() if head.startswith(mark)), None)


def is_text(head: bytes) -> bool:
    return bool(_marked(head) or _unmarked_utf16(head)) or not any(byte < 9 for byte in head)


def looks_like(head: bytes) -> str:
    """The kind of rows in fields that a text without an ending, or of another kind's, seems to hold."""
    if re.match(rb"\s*(\[\s*)?\{\s*\"", head):
        return "json"
    return "csv" if re.match(rb"(?=[^\n]*[,\t])(\w+[,\t])*text([,\t]\w+)*\r?\n", head) else ""


def _unmarked_utf16(head: bytes) -> str | None:
    """UTF-16's name where the text without a mark has many control characters as bytes and none as UTF-16."""
    for name in ("utf-8", "utf-16-le", "utf-16-be"):
        with contextlib.suppress(UnicodeDecodeError):
            text = codecs.getincrementaldecoder(name)().decode(head, name != "utf-8" and len(head) < _HEAD_BYTES)
            if name == "utf-8":
                if sum(byte < 9 for byte in head) < len(head) / 10:
                    return None
            elif re.search("[ \n]", text) and all(c.isprintable() or c in "\t\n\r\f\xa0\u3000" for c in text):
                return name
    return None


def _proposal(data: bytes, position: int, refused: str) -> str:
    """How to go on; what is Western and what is Central European look much alike."""
    import charset_normalizer

    sample = data[max(0, position - 5000) : position + 5000]
    sample = sample[: sample.rfind(b"\n") + 1] or sample  # not in the middle of a character
    names = [name for name in _PROPOSED if name != codecs.lookup(refused).name.replace("-", "_")]
    best = charset_normalizer.from_bytes(sample, cp_isolation=names).best()
    guess = best.encoding if best else names[0]
    if {guess, *names[:2]} == {"cp1252", "cp1250"}:
        guess = "cp1252 (Western Europe) or cp1250 (Central Europe)"
    return f"if it is text, name its encoding: --encoding {guess}"
