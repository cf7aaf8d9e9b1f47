"""Models, tokenizers and datasets from the Hub, and what can go wrong. Run: pytest tests/hub/test_fetch.py"""

from __future__ import annotations

import re
import socket
from pathlib import Path

import huggingface_hub
import pytest

from tests.hub.conftest import GPT2, WIKI, ask
from tests.hub_server import STRANGER, TOKEN, Fault, Files, HubServer
from wikift.base import hub
from wikift.base.errors import EnvironmentFault, UserError
from wikift.data.sources import Source, open_source
from wikift.data.tokenizer import load_tokenizer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "hub-errors.md"


@pytest.fixture(autouse=True)
def this_process(server: HubServer, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(server.url, home, monkeypatch)
    monkeypatch.setattr(hub, "_ANSWER_SECONDS", (0.5, 0.5))


def model(name: str = "gpt2") -> Path:
    return hub.fetch(name, "--model", hub.WEIGHTS)


def dataset(name: str = "Salesforce/wikitext") -> object:
    return open_source(Source(name, "wikitext-2-v1"))


def tokenizer(name: str, folder: Path) -> object:
    return load_tokenizer(name, folder / "tokenizer")


def quoted() -> list[str]:
    """The messages that the page about the Hub's errors quotes."""
    return re.findall(r"^\| `([^-`][^`]*)`", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def problem_of(kind: str, name: str, folder: Path) -> str:
    attempts = {"model": model, "dataset": dataset, "tokenizer": lambda name: tokenizer(name, folder)}
    with pytest.raises((UserError, EnvironmentFault)) as raised:
        attempts[kind](name)  # type: ignore[operator]
    message = str(raised.value)
    assert "\n" not in message
    assert any(text in message for text in quoted()), f"docs/how-to/hub-errors.md does not quote: {message}"
    return message


@pytest.mark.parametrize("kind", ["model", "tokenizer", "dataset"])
def test_one_line_for_each_failure(
    server: HubServer,
    kind: str,
    tmp_path: Path,
    gpt2_files: Files,
    wikitext_files: Files,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, files = ("datasets", wikitext_files) if kind == "dataset" else ("models", gpt2_files)
    server.add(f"{base}/some/gated", files, gated=True)
    server.add(f"{base}/some/private", files, private=True)
    setting = f"--{kind} "
    gated = problem_of(kind, "some/gated", tmp_path)
    assert gated.startswith(f"{setting}some/gated: is gated; ask for access at {server.url}/")
    assert "hf auth login" in gated
    for name in ("some/private", "some/missing"):
        assert problem_of(kind, name, tmp_path).startswith(f"{setting}{name}: is not there, or private: set HF_TOKEN")
    ours = "Salesforce/wikitext" if kind == "dataset" else "gpt2"
    assert "has no such branch, tag or commit" in problem_of(kind, f"{ours}@v9", tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "the Hub refuses the token" in problem_of(kind, ours, tmp_path)
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    assert "is gated" in problem_of(kind, "some/gated", tmp_path)
    monkeypatch.delenv("HF_TOKEN")
    server.faults.append(Fault("/api/", status=503))
    assert "the Hub answers 503" in problem_of(kind, ours, tmp_path)
    server.faults[:] = [Fault("/api/", delay=1.5)]
    assert "the Hub does not answer" in problem_of(kind, ours, tmp_path)
    assert not any("hf_wrong" in path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file())


def test_a_member_reads_what_is_private_and_gated(
    server: HubServer, gpt2_files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add("models/some/closed", gpt2_files, private=True, gated=True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert (model("some/closed") / "model.safetensors").read_bytes() == gpt2_files["model.safetensors"]


@pytest.mark.parametrize("fault", [Fault("/api/", status=500), Fault("/api/", delay=1.5), None])
def test_where_the_hub_is_gone_the_cache_is_used(
    server: HubServer,
    home: Path,
    tmp_path: Path,
    fault: Fault | None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        unused_address = f"http://127.0.0.1:{nobody.getsockname()[1]}"
    model(), dataset(), tokenizer("gpt2", tmp_path / "1")
    hub.commits.clear()
    capsys.readouterr()
    if fault is None:  # nobody listens
        ask(unused_address, home, monkeypatch)
    else:
        server.faults.append(fault)
    asked = len(server.requests)
    model(), dataset(), tokenizer("gpt2", tmp_path / "2")
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 1, "once"
    assert re.match(r"wikift: --model gpt2: the Hub .*; using the copy in the cache, commit [0-9a-f]{8}$", printed[0])
    assert len(server.requests) - asked <= 1, "not asked again"
    message = problem_of("model", "distilgpt2", tmp_path)
    assert "the Hugging Face cache has no copy" in message


def test_offline_by_the_users_wish(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model()
    hub.commits.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model()
    assert capsys.readouterr().err == ""
    assert "HF_HUB_OFFLINE is set" in problem_of("model", "distilgpt2", tmp_path)


def test_a_connection_that_breaks_continues_where_it_was(
    server: HubServer, gpt2_files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = gpt2_files["model.safetensors"]
    server.faults.append(Fault("GET .*model.safetensors", after_bytes=100_000, once=True))
    assert (model() / "model.safetensors").read_bytes() == weights
    ranges = [r["range"] for r in server.requests if r["method"] == "GET" and r["path"].endswith("model.safetensors")]
    assert ranges == [None, "bytes=65536-"]
    assert "the connection to the Hub broke" in capsys.readouterr().err


def test_large_files_are_shown_in_lines(
    server: HubServer, gpt2_files: Files, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wikift.base.hub._SHOWN_BYTES", 100_000)
    model()
    assert re.fullmatch(r"downloading gpt2/model.safetensors, 0\.\d MB\n", capsys.readouterr().err)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    server.add("models/some/other", gpt2_files)
    model("some/other")
    assert capsys.readouterr().err == ""


def test_revisions(server: HubServer, gpt2_files: Files, wikitext_files: Files) -> None:
    other = {**gpt2_files, "config.json": gpt2_files["config.json"] + b"\n"}
    commit = server.add(GPT2, other, branch="v1")
    assert model("gpt2@v1").name == commit
    hub.commits.clear()
    assert model(f"gpt2@{commit}").name == commit
    fewer = {name: data for name, data in wikitext_files.items() if "103" not in name}
    commit = server.add(WIKI, fewer, branch="small")
    corpus = open_source(Source("wikitext-2-v1", revision="small"))
    assert (corpus.revision, corpus.name, corpus.config) == (commit, "Salesforce/wikitext", "wikitext-2-v1")


def test_a_dataset_with_several_configurations_lists_them() -> None:
    for name in ("Salesforce/wikitext", "wikitext"):
        with pytest.raises(UserError, match=r"choose one of wikitext-2-v1, .*wikitext-103-raw-v1"):
            open_source(Source(name))
