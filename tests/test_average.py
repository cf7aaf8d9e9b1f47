"""consolidate.py --average-last: the exact mean of the last checkpoints, and whether it was better.

pytest tests/test_average.py
"""

from __future__ import annotations

import json
import re
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.export.test_export import weights_of
from tests.trained import text_store, trained_run
from wikift import average
from wikift.average import mean_weights
from wikift.base.errors import UserError
from wikift.base.folders import list_checkpoints, step_folder
from wikift.checkpoint.reader import open_checkpoint
from wikift.data.store import open_store
from wikift.export.export import main


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 4, 8 and 12, its store beside it."""
    folder = tmp_path_factory.mktemp("average")
    return trained_run(folder / "runs" / "small", text_store(folder / "store").path)


@pytest.fixture
def run(source: Path, tmp_path: Path) -> Path:
    shutil.copytree(source, tmp_path / "runs" / "small", ignore=shutil.ignore_patterns("hf"))
    return tmp_path / "runs" / "small"


def exact_mean(values: list[np.float32]) -> np.float32:
    """The fp32 number nearest to the mean of fp32 numbers, by exact arithmetic."""
    mean = sum((Fraction(float(value)) for value in values), Fraction(0)) / len(values)
    guess = np.float32(float(mean))
    around = (np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf)))
    return min(around, key=lambda near: (abs(Fraction(float(near)) - mean), int(near.view(np.int32)) & 1))  # even


@pytest.mark.parametrize("count", [2, 3])
def test_the_weights_are_the_exact_mean(run: Path, count: int) -> None:
    assert main([str(run), "--average-last", str(count), "--quiet"]) == 0
    model = AutoModelForCausalLM.from_pretrained(run / "hf")
    parts = [weights_of(run, step) for step in (4, 8, 12)[-count:]]
    for name, got in model.named_parameters():
        stacked = torch.stack([part[name] for part in parts])
        assert not torch.equal(stacked[0], stacked[1])
        assert torch.equal(got.data, stacked.double().mean(0).float()), name
        columns = stacked.flatten(1).numpy()[:, :50]
        assert [exact_mean(list(column)) for column in columns.T] == list(got.detach().flatten()[:50].numpy()), name
    assert model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()
    record = json.loads((run / "hf" / "wikift.json").read_text())
    assert (record["step"], record["averaged"]) == (12, [4, 8, 12][-count:])


def test_a_piece_at_a_time_is_the_same_mean(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = [open_checkpoint(path) for path in list_checkpoints(run)]
    whole = mean_weights(checkpoints)
    expected = {name: np.concatenate([piece.copy() for piece in whole.pieces(name)]) for name in whole.shapes}
    monkeypatch.setattr(average, "PIECE", 37)
    small = mean_weights(checkpoints)
    for name, values in expected.items():
        pieces = [piece.copy() for piece in small.pieces(name)]
        assert max(map(len, pieces)) <= 37
        assert np.array_equal(np.concatenate(pieces), values), name


@torch.no_grad()
def own_loss(run: Path) -> float:
    """The mean's loss on the validation split in blocks of 16, by transformers' model and torch alone."""
    store = open_store(json.loads((run / "config.json").read_text())["store_path"])
    ids = torch.from_numpy(store.tokens("validation").astype(np.int64))
    model, total = AutoModelForCausalLM.from_pretrained(run / "hf"), 0.0
    for start in range(0, len(ids) - 1, 16):
        block = ids[start : start + 17]
        logits = model(block[None, :-1]).logits[0]
        total += float(torch.nn.functional.cross_entropy(logits, block[1:], reduction="sum"))
    return total / (len(ids) - 1)


def test_the_report_says_whether_it_was_better(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for recorded, words in ((9.0, "better"), (0.5, "not better")):
        manifest = step_folder(run, 8) / "manifest.json"
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "eval_loss": recorded}))
        last = step_folder(run, 12) / "manifest.json"
        last.write_text(json.dumps({**json.loads(last.read_text()), "eval_loss": 9.0}))
        capsys.readouterr()
        assert main([str(run), "--average-last", "2"]) == 0
        said, card = capsys.readouterr().out, (run / "hf" / "README.md").read_text()
        found = re.search(r"the mean's loss is (\d+\.\d{4}) \(fp32\), .*: the mean is (better|not better)\.", said)
        assert found is not None
        assert found[2] == words
        assert float(found[1]) == pytest.approx(own_loss(run), abs=1e-4)
        assert found[0] in card
        assert "the last checkpoint's (step 12) 9.0000" in found[0]
        assert ("the best checkpoint's (step 8) 0.5000" in found[0]) == (recorded == 0.5)
        assert "the mean of those of steps 8, 12" in card
        assert "--average-last 2 --dtype float32" in card


def test_without_the_store_the_report_says_so(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    for change, words in (
        ({"store_path": str(run / "gone")}, "gone"),
        ({"store": {**config["store"], "dataset": "another"}}, "is not the store that this run was trained on"),
    ):
        (run / "config.json").write_text(json.dumps({**config, **change}))
        assert main([str(run), "--average-last", "2", "--quiet"]) == 0
        card = (run / "hf" / "README.md").read_text()
        (sentence,) = re.findall(r"Whether the mean is better was not measured: .*", card)
        assert words in sentence


def refused(*words: Any) -> tuple[str, ...]:
    with pytest.raises(UserError) as error:
        main([str(word) for word in words])
    return error.value.problems


def test_what_cannot_be_averaged_is_refused(run: Path) -> None:
    (problem,) = refused(run, "--average-last", 4)
    assert "4, 8, 12" in problem
    assert "train with smaller --save-steps" in problem  # its limit is 9
    config = json.loads((run / "config.json").read_text())
    config["settings"]["save_total_limit"] = 2  # then the checkpoint of step 4 is there as the best one only
    (run / "config.json").write_text(json.dumps(config))
    (problem,) = refused(run, "--average-last", 3)
    assert "has steps 8, 12; train with --save-total-limit 3" in problem
    assert refused(run, "--average-last", 1)[0].startswith("--average-last 1: must be 2 or more")
    assert "beside --best" in refused(run, "--average-last", 2, "--best")[0]
    assert "beside --step 8" in refused(run, "--average-last", 2, "--step", 8)[0]
    assert "is one checkpoint" in refused(step_folder(run, 8), "--average-last", 2)[0]
    assert not (run / "hf").exists()


def test_a_damaged_checkpoint_among_them_is_found(run: Path) -> None:
    (file,) = step_folder(run, 8).glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-50] ^= 4
    file.write_bytes(content)
    assert "its content has changed" in refused(run, "--average-last", 2)[0]
    assert not (run / "hf").exists()
