"""wikift compare and wikift runs, on runs of a second. pytest tests/commands/test_compare.py"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.tiny import arguments, tiny_store
from wikift.base.errors import UserError
from wikift.base.folders import checkpoint_steps
from wikift.base.publish import folder_lock
from wikift.commands.main import main


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs, two of them on the same tokens, and a folder that is none."""
    folder = tmp_path_factory.mktemp("compare")
    stores = [tiny_store(folder / "store"), tiny_store(folder / "other-store", seed=1)]
    (folder / "runs" / "notes").mkdir(parents=True)
    for name, store, settings in (("a", 0, {}), ("b", 0, {"learning_rate": 0.02}), ("c", 1, {})):
        words = {"save_total_limit": 9, "max_steps": 8, "save_steps": 2, "eval_steps": 2, **settings}
        assert main(["train", *arguments(stores[store], folder / "runs" / name, **words)]) == 0
    return folder / "runs"


def score(run: Path, nll: list[float]) -> None:
    """Write what evaluate keeps: four documents of ten tokens."""
    counts = [10.0] * len(nll)
    row = {"text": "t", "split": "test", "protocol": "blocks", "context": 8, "stride": 8, "scaled": False, "step": 8}
    row |= {"normaliser": "tokens", "documents": len(nll), "perplexity": 2.0, "word_perplexity": 2.0}
    row["by_document"] = {"nll": nll, "scored": counts, "tokens": counts, "words": counts, "bytes": counts}
    (run / "evaluations.jsonl").write_text(json.dumps(row) + "\n")


def test_equal_within_a_bound_or_not(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = tmp_path / "a", tmp_path / "b"
    shutil.copytree(runs / "a", one)
    shutil.copytree(runs / "b", other)
    losses = [json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["eval_loss"] for run in (one, other)]
    assert main(["compare", str(one), str(other), "--within", "9"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^learning_rate \(schedule\) +0.01 +0.02$", text, re.MULTILINE)
    difference = re.escape(f"{losses[1] - losses[0]:+.4f}")
    assert re.search(rf"^validation loss, last .*  {difference} +yes$", text, re.MULTILINE)
    assert main(["compare", str(one), str(other), "--within", "0"]) == 1
    # per document 0.1 and 0.3 nats a token more, by turns: 0.2, and by hand sqrt(4 / 3 * 4 * 0.1**2 / 4**2)
    score(one, [20.0] * 4)
    score(other, [21.0, 23.0, 21.0, 23.0])
    capsys.readouterr()
    assert main(["compare", str(one), str(other), "--within", "0.1"]) == 1
    assert re.search(
        r"^t, test, blocks, stride 8, per tokens .* \+0\.2000 \+- 0\.0577 +no$", capsys.readouterr().out, re.M
    )


def test_runs_on_different_tokens_have_nothing_to_compare(runs: Path) -> None:
    with pytest.raises(UserError, match="no result on the same text; evaluate both: wikift evaluate"):
        main(["compare", str(runs / "a"), str(runs / "c")])
    with pytest.raises(UserError) as caught:
        main(["compare", str(runs / "notes"), "--within", "-1"])
    assert len(caught.value.problems) == 3


def test_the_runs_of_a_folder_and_what_is_pruned(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["runs"]) == 0
    assert capsys.readouterr().out.startswith("no run in runs; ")
    shutil.copytree(runs, tmp_path / "runs")
    folder, ran = tmp_path / "runs", tmp_path / "runs" / "b"
    config = json.loads((ran / "config.json").read_text())
    config["derived"]["steps"] = 100
    (ran / "config.json").write_text(json.dumps(config))
    with folder_lock(folder / "c" / "run"):
        assert main(["runs", str(folder)]) == 0
        rows = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert [row[:3] for row in rows[1:]] == [
            [f"{folder}/a", "finished", "8/8"],
            [f"{folder}/b", "stopped", "8/100"],
            [f"{folder}/c", "running", "8/8"],
        ]
        with pytest.raises(UserError, match=r"--prune: asks before .* add --yes"):
            main(["runs", str(folder), "--prune"])
        monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
        monkeypatch.setattr("builtins.input", lambda prompt: print(prompt) or "n")
        assert main(["runs", str(folder), "--prune"]) == 0
        text = capsys.readouterr().out
        assert re.search(r"remove \d checkpoints, .* MB\? \[y/N\]\s+nothing is removed", text)
        assert f"{folder}/a/checkpoints/step-00000002" in text
        assert checkpoint_steps(folder / "a") == [2, 4, 6, 8]
        assert main(["runs", str(folder), "--prune", "--yes"]) == 0
    kept = checkpoint_steps(folder / "a")
    assert 8 in kept
    assert len(kept) <= 2
    assert checkpoint_steps(folder / "c") == [2, 4, 6, 8], "it is written to"
