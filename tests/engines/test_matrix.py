"""Any engine to any other: a part of tests/matrix.py, in which each engine writes, each reads, and the ranks change."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.matrix import SINGLE, TOLERANCE, Place, line, read, train_all, write
from tests.ranks import run_ranks
from tests.tiny import curve, tiny_store

# Three ranks divide neither the rows of the vocabulary (97) nor a block's width (32)
READERS = {
    Place("zero3", 3): [SINGLE, Place("zero1", 2)],
    Place("fsdp", 3): [Place("zero3", 3), Place("ddp", 2)],
    Place("ddp", 2): [Place("fsdp", 3), Place("zero2", 4)],
    Place("zero1", 2): [Place("ddp", 2), Place("zero1", 2)],
    Place("zero2", 4): [Place("zero1", 2), Place("zero2", 4)],
    SINGLE: [Place("zero2", 4), Place("fsdp", 3), Place("zero3", 3)],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("matrix")
    tiny_store(made / "store")
    write(made, {SINGLE, *READERS, *(writer for writers in READERS.values() for writer in writers)})
    return made


@pytest.mark.parametrize("reader", READERS, ids=str)
def test_a_checkpoint_of_any_engine_goes_on_under_any_other(folder: Path, reader: Place) -> None:
    for writer, gap in read(folder, READERS[reader], reader):
        assert gap <= (0 if writer == reader else TOLERANCE), (writer, reader)


SAME = [Place("fsdp", 3), Place("zero1", 2), pytest.param(Place("zero2", 4), marks=pytest.mark.long), Place("zero3", 3)]


@pytest.mark.parametrize("place", SAME, ids=str)
def test_the_same_engine_and_ranks_go_on_bit_for_bit_with_dropout(folder: Path, place: Place, tmp_path: Path) -> None:
    (tmp_path / "store").symlink_to(folder / "store")
    write(tmp_path, [place], dropout=0.2)
    assert list(read(tmp_path, [place], place, dropout=0.2)) == [(place, 0.0)]


@pytest.mark.long
def test_a_chain_of_engines_is_one_run(tmp_path: Path) -> None:
    """ZeRO-3 on 4, FSDP2 on 2, one process, ZeRO-1 on 3: three steps each, against 12 steps of one process."""
    tiny_store(tmp_path / "store")
    words = {"lr_scheduler_type": "constant", "save_steps": 3, "eval_steps": 3}
    write(tmp_path, [SINGLE], max_steps=12, **words)
    run = tmp_path / "chain"
    for number, place in enumerate((Place("zero3", 4), Place("fsdp", 2), SINGLE, Place("zero1", 3)), 1):
        command = line(place, tmp_path / "store", run, max_steps=3 * number, **words)
        assert run_ranks(train_all, place.ranks, [command], timeout_seconds=300) == [[0]] * place.ranks, place
    for got, expected in zip(curve(run), curve(tmp_path / str(SINGLE)), strict=True):
        assert got == pytest.approx(expected, abs=TOLERANCE)
