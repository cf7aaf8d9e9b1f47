"""A Hub that serves small stand-ins for gpt2 and Salesforce/wikitext."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from tests.hub_server import Files, HubServer
from tests.trained import SENTENCES
from wikift.base import hub
from wikift.base.names import WIKITEXT
from wikift.data.tokenizer import train

GPT2, WIKI = "models/openai-community/gpt2", "datasets/Salesforce/wikitext"


@pytest.fixture(scope="session")
def gpt2_files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A GPT-2 of two layers with a tokenizer of 320 tokens, and what nobody reads."""
    folder = tmp_path_factory.mktemp("gpt2")
    saved = train(SENTENCES, 320, folder)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 32, "vocab_size": saved.vocab_size}
    config = GPT2Config(**shape, bos_token_id=saved.eos_token_id, eos_token_id=saved.eos_token_id)
    GPT2LMHeadModel(config).save_pretrained(folder)
    GenerationConfig(eos_token_id=saved.eos_token_id).save_pretrained(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return {**files, "README.md": b"---\nlicense: mit\n---\n", "pytorch_model.bin": b"never read"}


@pytest.fixture(scope="session")
def wikitext_files() -> Files:
    """The four configurations, in parquet, as the card of Salesforce/wikitext lists them."""
    rows = [" = The Renaissance = \n", *(text.replace("\n", " \n") for text in SENTENCES)]
    files, listed = {}, ""
    for config in WIKITEXT:
        listed += f"- config_name: {config}\n  data_files:\n"
        for split, repeat in (("train", 12), ("validation", 2), ("test", 1)):
            buffer = io.BytesIO()
            pq.write_table(pa.table({"text": rows * repeat}), buffer)
            files[f"{config}/{split}-00000-of-00001.parquet"] = buffer.getvalue()
            listed += f"  - split: {split}\n    path: {config}/{split}-*\n"
    return {**files, "README.md": f"---\nlanguage:\n- en\nconfigs:\n{listed}---\n# A stand-in\n".encode()}


@pytest.fixture
def server(gpt2_files: Files, wikitext_files: Files) -> Iterator[HubServer]:
    with HubServer() as hub:
        hub.add(GPT2, gpt2_files, alias="gpt2")
        hub.add(WIKI, wikitext_files, alias="wikitext")
        yield hub


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """HF_HOME."""
    return tmp_path / "home"


def ask(url: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process take `url` for the Hub, with a cache in `home`, no token and nothing remembered."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setenv("HF_ENDPOINT", url)
    for name in ("HF_TOKEN", "HF_HUB_DISABLE_PROGRESS_BARS"):  # the second is left by a quiet command
        monkeypatch.delenv(name, raising=False)
    hub.commits.clear()
    hub._silent.clear()
