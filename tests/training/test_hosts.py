"""What must be the same on all hosts: ranks that believe to be on hosts of their own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.tiny import tiny_store


def check(folders: list[Path], stores: list[Path], local_size: str) -> tuple[str, ...]:
    """The problems that this rank, with its own folder and store, is told of."""
    from wikift.base.errors import UserError
    from wikift.base.world import start_world
    from wikift.data.store import open_store
    from wikift.training.hosts import check_hosts

    os.environ["LOCAL_WORLD_SIZE"] = local_size
    world = start_world("cpu")
    try:
        check_hosts(folders[world.rank], open_store(stores[world.rank]), world)
    except UserError as error:
        return error.problems
    return ()


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    found = [tmp_path / f"run-{n}" for n in range(3)]
    for folder in found:
        folder.mkdir()
    return found


def test_a_shared_folder_and_copies_of_the_store_pass(folders: list[Path], tmp_path: Path) -> None:
    stores = [tiny_store(tmp_path / f"store-{n}") for n in range(3)]
    assert run_ranks(check, 3, [folders[0]] * 3, stores, "1") == [()] * 3
    assert list(folders[0].iterdir()) == []


def test_every_difference_is_told_on_every_rank(folders: list[Path], tmp_path: Path) -> None:
    stores = [tiny_store(tmp_path / f"store-{n}", seed=int(n == 2)) for n in range(3)]
    told = run_ranks(check, 3, [folders[0], folders[1], folders[1]], stores, "1")
    for rank, (folder, store) in enumerate(told):
        assert folder.startswith(f"--output-dir {folders[min(rank, 1)]}: is a different folder on rank 1, 2 than on")
        assert store.startswith(f"--data {stores[rank]}: has different tokens on rank 2 than on rank 0")
    assert [list(path.iterdir()) for path in folders] == [[]] * 3


def test_one_host_is_not_asked(folders: list[Path], tmp_path: Path) -> None:
    stores = [tiny_store(tmp_path / "store")] * 3
    assert run_ranks(check, 3, folders, stores, "3") == [()] * 3
