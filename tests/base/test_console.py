"""How far a long task has come, as one line; what a terminal would obey is spelled out."""

from __future__ import annotations

import json
import os
import pty
from pathlib import Path

import pytest

from wikift.base import console
from wikift.base.errors import one_line
from wikift.base.files import json_line
from wikift.commands.main import main, run


def test_a_fraction_and_the_time_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = 100.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    progress, quiet = console.Progress(quiet=False), console.Progress(quiet=True)
    for seconds, done in ((0, 0.0), (12, 0.0), (15, 0.1), (30, 0.1), (50, 0.5), (70, 1.2)):
        now = 100.0 + seconds
        progress.fraction("a.txt", done)
        quiet.fraction("a.txt", done)
    progress.clear()  # nothing to remove where the lines stay
    lines = ["a.txt: reading", "a.txt: 10%, 4 min left", "a.txt: 50%, 50 s left", "a.txt: 100%, 0 s left"]
    assert capsys.readouterr().err.splitlines() == lines


@pytest.mark.parametrize("odd", ["\x1b[31m", "\x9b31m", "\r", "\x07", "\x7f", "\u2028", "\u202e", "\udcff"])
def test_no_control_character_is_printed(odd: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a path, a wrong option, a name in a file, and in JSON, which stays what it was."""
    shown = f"\\x{ord(odd[0]):02x}{odd[1:]}" if ord(odd[0]) < 256 else f"\\u{ord(odd):04x}"
    readme = tmp_path / "README.md"
    readme.write_bytes(f"---\nconfigs:\n- data_files: {{'a\u00e9 {odd}': b}}".encode("utf-8", "surrogateescape"))
    for line in (["evaluate", f"a{odd}"], ["train", f"--{odd}"], [f"p{odd}"], ["prepare", "--dataset", str(tmp_path)]):
        with pytest.raises(SystemExit) as left:
            run(main, line)
        assert left.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert shown in err
    assert not [sign for sign in err if sign in odd[:1]]
    content = {"text": f"a{odd}\n"}
    text = json_line(content)
    assert text.isprintable()
    assert json.loads(text) == content


def test_a_password_in_an_address_is_not_told() -> None:
    assert one_line(OSError("no answer of http://me:secret@host/a@b")) == "no answer of http://host/a@b"


def test_a_closed_terminal_is_no_fault() -> None:
    ours, theirs = pty.openpty()
    with open(theirs, "w", buffering=1) as terminal, open(os.devnull, "w") as nowhere:
        os.close(ours)
        with pytest.raises(OSError, match="Input/output error"):
            terminal.write("text\n")
        console.print("text", file=terminal, flush=True)
        os.dup2(nowhere.fileno(), theirs)  # for what is still to be written when it closes
