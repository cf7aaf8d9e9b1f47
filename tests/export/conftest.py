"""A trained run for the tests of its export."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.trained import text_store, trained_run


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 4, 8 and 12; tests that write into a run take `run` instead."""
    folder = tmp_path_factory.mktemp("export")
    return trained_run(folder / "runs" / "small", text_store(folder / "store").path)


@pytest.fixture
def run(source: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may change."""
    return Path(shutil.copytree(source, tmp_path / "runs" / "small"))
