"""The interactive session, on a terminal and in a pipe. Run: pytest tests/commands/test_session.py"""

from __future__ import annotations

import io
import json
import re
import sys
import time
from pathlib import Path

import pytest

from tests.terminal import Terminal
from wikift.base.errors import UserError
from wikift.commands.generate import main
from wikift.commands.session import set_value
from wikift.settings.run_fields import GenerateSettings

ROOT = Path(__file__).resolve().parents[2]


def in_a_pipe(made: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, *words: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
    return main([str(made), "--device", "cpu", *words])


@pytest.mark.parametrize("leave", [b"/quit", b" exit "])
def test_a_pipe_of_prompts_and_commands(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], leave: bytes
) -> None:
    content = (
        b"/set max-new-tokens 4\n/set temperature 0\nWarsaw\r\n\n"
        b"/set temperature hot\n/set top_p 7\n/set nothing 1\n/set top_k 7\n/set\n/unknown\n"
        b"/show\nH\xe4nsch\n/help\n" + leave + b"\nnever\n"
    )
    assert in_a_pipe(made, monkeypatch, content) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].startswith("Warsaw")
    assert re.search(r"^temperature +0\.0 *$", out, re.M)
    assert re.search(r"^repetition_penalty +1\.0 *$", out, re.M)
    assert re.search(r"^max_new_tokens +4 *$", out, re.M)
    assert "\nH\ufffdnsch" in out
    assert re.search(r"^/set NAME VALUE +change a setting;", out, re.M)
    assert "> " not in out
    assert "never" not in out
    problems = [line for line in err.splitlines() if not line.startswith("wikift: ")]
    assert [line.split(":")[0].split(",")[0] for line in problems] == [
        "--temperature hot", "--top-p 7", "/set nothing", "--top-k 7", "/set ", "/unknown",
    ]  # fmt: skip


def test_a_pipe_in_json_and_seeds(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = b"The\nThe\n/set seed 42\nThe\n/set seed 7\nThe\n/set seed 42\nThe"
    assert in_a_pipe(made, monkeypatch, content, "--json", "--max-new-tokens", "8") == 0
    texts = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
    assert texts[0] != texts[1], "answers of one session differ"
    assert texts[4] == texts[0], "a seed restarts with its first answer"
    assert main([str(made), "--prompt", "The", "--json", "--max-new-tokens", "8", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == texts[0]


def test_setting_values() -> None:
    before = GenerateSettings()
    assert set_value(before, "top-k", "7").top_k == 7
    assert set_value(before, "top_k", "7").prompt is None
    assert set_value(before, "stop", r"end of \n line").stop == ("end of \n line",)
    for name, value in (("top_k", "7"), ("stop", "x")):
        assert set_value(set_value(before, name, value), name, "") == before, "back to the default"
    for name, value in (("top_k", "1.5"), ("top_k", "-1"), ("prompt", "x"), ("json", "true"), ("", "")):
        with pytest.raises(UserError):
            set_value(before, name, value)


_SLOWLY = """
import sys, time
from wikift.generation.stream import Stream
take = Stream.take
def slowly(self, token, **show):
    time.sleep(0.1)
    take(self, token, **show)
Stream.take = slowly
from wikift.commands.main import run
from wikift.commands.generate import main
run(main)
"""


def test_on_a_terminal(made: Path) -> None:
    """Editing, arrow up, Ctrl-C on the text and on a line, Ctrl-D: one process for all of it, as its start takes long.

    The model takes its time, so that there is a text to stop.
    """
    command = [sys.executable, "-c", _SLOWLY, str(made), "--device", "cpu", "--json", "--max-new-tokens", "60"]
    terminal = Terminal(command, PYTHONPATH=str(ROOT))
    terminal.wait_for(r"> ")
    terminal.send("Hänschen\x7f\x7f und 東京\n")  # two backspaces
    time.sleep(2)
    terminal.send("\x03")  # stops the text
    answer = terminal.wait_for(r"\{.*\}", 5)
    found = json.loads(answer[answer.index("{") :])
    assert found["prompt"] == "Hänsch und 東京"
    assert found["finish_reason"] == "interrupted"
    assert 0 < found["new_tokens"] < 40
    terminal.wait_for(r"> ")
    terminal.send("line begun")
    terminal.wait_for("begun")
    time.sleep(0.5)  # CPython sees a signal that comes before readline waits only at the next key
    terminal.send("\x03")  # drops the line
    terminal.wait_for(r"/quit or Ctrl-D quits")
    terminal.wait_for(r"> ")
    terminal.send("/set max_new_tokens 1\n")
    terminal.wait_for(r"> ")
    terminal.send("\x1b[A\x1b[A\n")  # arrow up, twice
    answer = terminal.wait_for(r"\{.*\}")
    found = json.loads(answer[answer.index("{") :])
    assert (found["prompt"], found["finish_reason"]) == ("Hänsch und 東京", "length")
    terminal.wait_for(r"> ")
    terminal.send("\x04")
    assert terminal.exit_code() == 0
