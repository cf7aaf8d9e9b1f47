"""A model of random weights, for the tests that change its files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel

from tests.tiny_engines import tiny_config
from tests.trained import text_store
from wikift.data.store import TokenStore


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return text_store(tmp_path_factory.mktemp("weights") / "store")


@pytest.fixture(scope="module")
def sound(store: TokenStore) -> Path:
    """A model of random weights with the tokenizer of `store`."""
    folder = store.path.parent / "model"
    torch.manual_seed(3)
    GPT2LMHeadModel(tiny_config(vocab_size=store.vocab_size)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(store.path / "tokenizer").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(sound, tmp_path / "model"))
