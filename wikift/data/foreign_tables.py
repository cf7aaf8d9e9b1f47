"""Parquet and Arrow files, read in a process of its own: a changed byte crashes pyarrow, for one file in a hundred.

The process writes frames to its standard output: two sizes, then the bytes and offsets of texts, as `Texts` has them.
Where the first size is -1 the second is that of a JSON object: {"file": NAME} that begins, {"size": N} of one that was
checked, {"problems": [...]} or {} at the end.
"""

from __future__ import annotations

import json
import resource
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wikift.base.errors import UserError, one_line
from wikift.data.open_file import TextFile, faults, streams
from wikift.data.tables import check_table, read_table
from wikift.data.texts import Texts

_SIZES = struct.Struct("<qq")
# isolated (-I): nothing is imported from the current folder that this process would not import
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from wikift.data import foreign_tables as t; t.serve()"
)


def table_rows(files: Sequence[TextFile], column: str) -> Iterator[Texts]:
    """The texts of `column`, in order. Raises UserError for a file that is damaged or has no such text."""
    return _answers(files, column, check=False)


def table_sizes(files: Sequence[TextFile], column: str) -> list[int]:
    """About how many bytes of text `column` has in each file, read in place. Raises UserError as `table_rows` does."""
    return list(_answers(files, column, check=True)) if files else []


def _answers(files: Sequence[TextFile], column: str, *, check: bool) -> Iterator[Any]:
    asked = [(str(file.path), file.member, file.head[:8].hex(), file.size) for file in files]
    command, pipe = [sys.executable, "-I", "-c", _PROGRAM, json.dumps(sys.path)], subprocess.PIPE
    name = str(files[0])
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps([asked, column, check]).encode())
            process.stdin.close()
            while len(head := process.stdout.read(_SIZES.size)) == _SIZES.size:
                first, second = _SIZES.unpack(head)
                data, rest = process.stdout.read(max(0, first)), process.stdout.read(second)
                if len(data) + len(rest) != max(0, first) + second:
                    break
                if first >= 0:
                    yield Texts(np.frombuffer(data, np.uint8), np.frombuffer(rest, np.int64))
                    continue
                answer = json.loads(rest)
                name = answer.get("file", name)
                if "size" in answer:
                    yield answer["size"]
                elif "problems" in answer:
                    raise UserError(*answer["problems"])
                elif not answer:
                    return
        finally:
            process.kill()
    raise UserError(f"{name}: is damaged (reading it crashed); copy or download it again")


# --- in that process ---------------------------------------------------------------------------------------------


def serve() -> None:
    """Read what standard input asks for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who asked ends this
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    asked, column, check = json.load(sys.stdin)
    files = [TextFile(Path(path), member, bytes.fromhex(head), size) for path, member, head, size in asked]
    file, out = files[0], sys.stdout.buffer
    try:
        for file, stream in ((file, None) for file in files) if check else streams(files):
            _send({"file": str(file)})
            if check:
                _send({"size": check_table(file, column)})
                continue
            with faults(file):
                for texts in read_table(file, stream, column):
                    out.write(_SIZES.pack(texts.data.nbytes, texts.offsets.nbytes))
                    out.write(texts.data.data)
                    out.write(texts.offsets.data)
        _send({})
    except UserError as error:
        _send({"problems": error.problems})
    except Exception as error:  # of pyarrow: a damaged file has it raise nearly everything
        _send({"problems": [f"{file}: is damaged or incomplete ({one_line(error)}); copy or download it again"]})


def _send(answer: dict[str, Any]) -> None:
    text = json.dumps(answer).encode()
    sys.stdout.buffer.write(_SIZES.pack(-1, len(text)) + text)
    sys.stdout.buffer.flush()
