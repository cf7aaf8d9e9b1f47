"""Settings of the whole suite."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # two test processes share two cores; threads that wait for a core spin
os.environ["HF_HUB_OFFLINE"] = "1"  # no test waits for a network
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):  # of whatever started the suite
    os.environ.pop(name, None)
# Started in the background of a shell the suite ignores SIGINT, and every process that a test starts inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny store, in a folder that the tests of one file have to themselves."""
    from tests.tiny import tiny_store

    return tiny_store(tmp_path_factory.mktemp("tiny") / "store")
