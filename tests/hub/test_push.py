"""wikift consolidate --push-to-hub. Run: pytest tests/hub/test_push.py"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.hub.conftest import ask
from tests.hub_server import STRANGER, TOKEN, Fault, HubServer
from tests.trained import text_store, trained_run
from wikift.base.errors import EnvironmentFault, UserError
from wikift.commands.consolidate import main

NAME = "member/mine"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own upload


@pytest.fixture
def run(server: HubServer, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run, in a process that asks the server as one who may write."""
    made = trained_run(tmp_path / "runs" / "small", text_store(tmp_path / "store").path)
    ask(server.url, home, monkeypatch)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return made


def test_an_export_is_pushed_to_a_private_repository(
    server: HubServer, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run), "--push-to-hub", NAME, "--max-shard-size", "30KB"]) == 0
    repository = server.repositories[f"models/{NAME}"]
    assert repository.private
    assert f"pushed: {server.url}/{NAME}" in capsys.readouterr().out
    assert main([str(run), "--step", "8", "--push-to-hub", NAME, "--quiet"]) == 0
    exported = {path.name: path.read_bytes() for path in (run / "hf").iterdir()}
    pushed = {name: data for name, data in repository.branches["main"].items() if name != ".gitattributes"}
    assert pushed == exported, "and nothing of the earlier one"
    assert json.loads(pushed["wikift.json"])["step"] == 8
    captured = capsys.readouterr()
    assert captured.out == ""
    texts = [captured.err, *(p.read_text(errors="replace") for p in tmp_path.rglob("*") if p.is_file())]
    assert not any(TOKEN in text for text in texts)
    assert main([str(run), "--push-to-hub", "member/open", "--no-private"]) == 0
    assert not server.repositories["models/member/open"].private


def test_what_cannot_be_pushed(server: HubServer, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.faults.append(Fault("/api/.*/commit/", status=503))
    with pytest.raises(EnvironmentFault, match=r"--push-to-hub member/mine: the Hub answers 503\. The model is"):
        main([str(run), "--push-to-hub", NAME])
    assert (run / "hf" / "model.safetensors").exists()
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    with pytest.raises(UserError, match=r"the Hub answers 403; .* use a token with the right to write there"):
        main([str(run), "--push-to-hub", NAME])
    monkeypatch.delenv("HF_TOKEN")
    asked = len(server.requests)
    for line, problem in (
        (["--push-to-hub", NAME], "needs a token with the right to write; log in: hf auth login, or set HF_TOKEN"),
        (["--push-to-hub", "not a name"], "is no name of a repository"),
        (["--no-private"], "--no-private: has no effect without --push-to-hub"),
    ):
        with pytest.raises(UserError, match=problem):
            main([str(run), *line])
    assert len(server.requests) == asked
