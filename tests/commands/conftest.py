"""A trained run for the tests of generate and of its session."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trained import text_store, trained_run
from wikift.commands.generate import main


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps with positions for 64 tokens, exported."""
    folder = tmp_path_factory.mktemp("generate")
    shape = "n_layer=2,n_head=2,n_embd=32,n_positions=64"
    run = trained_run(folder / "runs" / "small", text_store(folder / "store").path, config_overrides=shape)
    assert main([str(run), "--prompt", "", "--max-new-tokens", "1", "--device", "cpu", "--quiet"]) == 0
    return run
