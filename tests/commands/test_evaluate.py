"""Windows, scores and wikift evaluate. Run: pytest tests/commands/test_evaluate.py"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tests.ranks import run_ranks
from tests.trained import text_store, trained_run
from wikift.base.errors import UserError
from wikift.base.world import World, start_world
from wikift.commands.evaluate import main
from wikift.data.store import TokenStore, open_store
from wikift.evaluation.score import IGNORED, Score, score_split, window_count, windows
from wikift.model.gpt2 import NextTokenLoss, load_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[TokenStore, Path]:
    """A store and a run of 12 steps with positions for 32 tokens, exported to RUN/hf by the first that asks."""
    folder = tmp_path_factory.mktemp("evaluate")
    store = text_store(folder / "store")
    return store, trained_run(folder / "runs" / "small", store.path)


@given(tokens=st.integers(0, 60), context=st.integers(1, 12), data=st.data())
def test_every_token_but_the_first_is_scored_once_behind_its_context(
    tokens: int, context: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, context))
    ids = np.arange(100, 100 + tokens, dtype=np.uint16)  # an id tells its position
    scored: list[int] = []
    count = window_count(tokens, context, stride)
    for number in range(count):
        inputs, targets = windows(ids, np.array([number]), context=context, stride=stride)
        assert inputs.shape == targets.shape == (1, context)
        places = np.nonzero(targets[0] != IGNORED)[0]
        assert len(places), "a window with nothing to score"
        for place in places:
            position = int(targets[0, place]) - 100
            seen = min(position, int(place) + 1)
            assert inputs[0, : place + 1][-seen:].tolist() == ids[position - seen : position].tolist()
            # the whole context, less what a stride takes; the very beginning has what there is
            assert place + 1 >= min(position, context - stride + 1)
        scored += [int(t) - 100 for t in targets[0, places]]
    assert scored == list(range(1, tokens))
    beyond = (
        windows(ids, np.arange(count, count + 3), context=context, stride=stride)[1]
        if tokens > 1
        else np.array(IGNORED)
    )
    assert (beyond == IGNORED).all()


def by_hand(model: Any, ids: list[int], context: int, stride: int) -> float:
    """The usual loop over strides (transformers' page on perplexity), one window a forward, in float64."""
    total, before = 0.0, 0
    for begin in range(0, len(ids) - 1, stride):
        end = min(begin + context, len(ids) - 1)
        with torch.no_grad():
            logits = model(torch.tensor([ids[begin:end]])).logits[0].double()  # (end - begin, vocabulary)
        new = end - before
        total += float(F.cross_entropy(logits[-new:], torch.tensor(ids[end + 1 - new : end + 1]), reduction="sum"))
        before = end
        if end == len(ids) - 1:
            break
    return total


def score(store: TokenStore, model: Any, world: World = World(), **window: int) -> tuple[Score, list[Any]]:  # noqa: B008
    calls = []
    losses = NextTokenLoss(model)

    def nll(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        assert inputs.dtype == targets.dtype == torch.int64
        with torch.no_grad():
            total = losses(inputs, targets).double().sum()
        calls.append((tuple(inputs.shape), bool((targets == IGNORED).all()), float(total)))
        return total

    return score_split(nll, store, "validation", world=world, **{"batch": 4, **window}), calls


@pytest.mark.parametrize(("context", "stride"), [(32, 32), (32, 8), (32, 1), (7, 3), (1, 1)])
def test_the_sum_is_that_of_the_usual_loop(made: tuple[TokenStore, Path], context: int, stride: int) -> None:
    store, run = made
    model = load_model(str(exported(run)))
    found, _ = score(store, model, context=context, stride=stride)
    ids = store.tokens("validation").tolist()
    assert found.nll == pytest.approx(by_hand(model, ids, context, stride), rel=1e-6)
    assert found.tokens == len(ids) - 1
    assert (found.words, found.bytes) == (store.splits["validation"].words, store.splits["validation"].bytes)


def test_the_micro_batch_places_the_work_only(made: tuple[TokenStore, Path]) -> None:
    store, run = made
    model = load_model(str(exported(run)))
    sums = [score(store, model, context=16, stride=4, batch=batch)[0].nll for batch in (1, 3, 100)]
    assert sums == pytest.approx([sums[0]] * 3, rel=1e-6)


def on_a_rank(store: Path, model: str) -> tuple[Score, list[Any]]:
    return score(open_store(store), load_model(model), start_world("cpu"), context=32, stride=32, batch=1)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_windows_and_agree(made: tuple[TokenStore, Path], ranks: int) -> None:
    store, run = made
    alone, _ = score(store, load_model(str(exported(run))), context=32, stride=32)
    answers = run_ranks(on_a_rank, ranks, store.path, str(exported(run)))
    for found, calls in answers:
        assert found == answers[0][0]
        assert found.nll == pytest.approx(alone.nll, rel=1e-6)
        assert len(calls) == len(answers[0][1]), "an engine's forward may be collective"
    calls = [call for _, made_calls in answers for call in made_calls]
    assert sum(not empty for _, empty, _ in calls) == window_count(alone.tokens + 1, 32, 32) == 7
    assert all(total == 0 for _, empty, total in calls if empty)
    assert any(empty for _, empty, _ in calls), "seven windows on these ranks leave one without work"


def test_one_sum_gives_all_the_measures() -> None:
    found = Score(nll=100.0, tokens=50, words=40, bytes=200, context=8, stride=4)
    assert found.loss == 2
    assert found.perplexity == pytest.approx(math.e**2)
    assert found.word_perplexity == pytest.approx(math.exp(2 * 51 / 40))  # a first token that nothing predicts
    assert found.bits_per_byte == pytest.approx(2 * 51 / 200 / math.log(2))
    assert Score(1e6, 10, 10, 10, 8, 8).perplexity == math.inf


def exported(run: Path) -> Path:
    if not (run / "hf").exists():
        from wikift.export.export import main as consolidate

        assert consolidate([str(run), "--quiet"]) == 0
    return run / "hf"


def test_a_run_is_exported_and_scored_on_its_own_store(
    made: tuple[TokenStore, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    store, _ = made
    run = trained_run(tmp_path / "runs" / "new", store.path, max_steps=4)
    assert main([str(run), "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert (run / "hf" / "model.safetensors").is_file()
    assert "step 4" in err
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[2] == "split protocol context stride normaliser tokens words perplexity"
    tokens = store.splits["validation"].tokens
    unscored = window_count(tokens + 1, 32, 32)  # each block's first token
    assert lines[3].startswith(f"validation blocks 32* 32* tokens {tokens - unscored} 74 ")
    assert any(line.startswith("test knn 32* 16* words ") for line in lines)
    assert any("*: windows scaled" in line for line in lines)
    assert any("need the text" in line and "--dataset" in line for line in lines)
    # the last validation of the training had blocks of 16 tokens: the same protocol gives the same number
    words = ["--context", "16", "--split", "validation", "--json", "--precision", "fp32", "--device", "cpu"]
    assert main([str(run), *words]) == 0
    found = json.loads(capsys.readouterr().out)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert found["perplexity"] == pytest.approx(last["eval_perplexity"], rel=1e-6)
    assert found["word_perplexity"] == pytest.approx(last["eval_word_perplexity"], rel=1e-6)


def test_json_is_an_object_a_model(made: tuple[TokenStore, Path], capsys: pytest.CaptureFixture[str]) -> None:
    store, run = made
    line = [str(exported(run)), str(run), "--split", "test", "--stride", "8", "--data", str(store.path), "--quiet"]
    assert main([*line, "--json", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    first, second = (json.loads(text) for text in out.splitlines())
    assert err == ""
    assert first["nll"] == second["nll"]
    assert (first["context"], first["stride"], first["split"], first["protocol"]) == (32, 8, "test", "free")
    tokens = store.splits["test"].tokens
    assert first["loss"] == pytest.approx(first["nll"] / (tokens - 1))
    assert first["bits_per_byte"] == pytest.approx(first["loss"] * tokens / math.log(2) / store.splits["test"].bytes)
    assert second["difference"]["tokens"]["mean"] == 0
    assert main([*line, "--csv", "--device", "cpu"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["normaliser"] for row in rows] == ["tokens", "words", "bits/byte"] * 2
    assert float(rows[0]["value"]) == pytest.approx(first["perplexity"])


def test_the_precision_that_is_said_is_the_one_computed_in(
    made: tuple[TokenStore, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    found = {}
    for precision in ("fp32", "bf16"):
        words = ["--protocol", "free", "--split", "test", "--precision", precision, "--device", "cpu", "--json"]
        assert main([str(made[1]), *words]) == 0
        (line,) = capsys.readouterr().out.splitlines()
        found[precision] = json.loads(line)
        assert found[precision]["precision"] == precision
    assert found["bf16"]["nll"] != found["fp32"]["nll"], "rounding to 8 bits shows"
    assert found["bf16"]["nll"] == pytest.approx(found["fp32"]["nll"], rel=1e-2)


def test_torchrun_gives_the_same_number_once(made: tuple[TokenStore, Path], capsys: pytest.CaptureFixture[str]) -> None:
    _, run = made
    words = [str(exported(run)), "--protocol", "knn", "--split", "validation", "--json", "--precision", "fp32"]
    words += ["--device", "cpu"]
    assert main(words) == 0
    alone = json.loads(capsys.readouterr().out)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, str(ROOT / "launch" / "evaluate.py"), *words],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    together = json.loads(line)
    assert together["processes"] == 2
    assert together["nll"] == pytest.approx(alone["nll"], rel=1e-6)


def test_what_is_wrong_is_said_all_at_once(made: tuple[TokenStore, Path], tmp_path: Path) -> None:
    store, run = made
    other = text_store(tmp_path / "other", vocabulary=300)
    empty = tmp_path / "empty"
    (empty / "checkpoints").mkdir(parents=True)
    (empty / "config.json").write_text('{"wikift": "0", "settings": {}, "store_path": "nowhere"}')
    lines: list[tuple[list[str], list[str]]] = [
        ([], ["MODEL: is missing"]),
        ([str(run), "--split", "train2"], ["--split train2", "train, validation, test"]),
        ([str(run), "--context", "64"], ["--context 64", "32 positions"]),
        ([str(run), "--stride", "33"], ["--stride 33", "32"]),
        ([str(run), "--context", "8", "--stride", "9"], ["--stride 9", "--context 8"]),
        (
            [str(run), "--context", "0", "--per-device-eval-batch-size", "-1"],
            ["--context 0", "--per-device-eval-batch-size -1"],
        ),
        ([str(run), "--data", str(tmp_path / "none")], ["--data", "none"]),
        ([str(run), "--data", str(other.path)], ["tokenizer", str(other.path)]),
        (["gpt2"], ["--data: is missing", "gpt2"]),
        (["no/such/model", "--data", str(store.path)], ["no/such/model"]),
        ([str(empty)], [str(empty), "wikift train"]),
        ([str(store.path)], [str(store.path), "neither a model nor a run"]),
        ([str(run / "config.json")], ["is a file"]),
        ([str(run / "checkpoints" / "step-00000012")], ["is a checkpoint", "consolidate"]),
        ([str(run), "--bogus", "1", "--stride", "x"], ["--bogus", "--stride x"]),
    ]
    for words, expected in lines:
        with pytest.raises(UserError) as raised:
            main(words)
        for part in expected:
            assert part in str(raised.value), words


def test_a_split_of_one_token_has_nothing_to_score(made: tuple[TokenStore, Path], tmp_path: Path) -> None:
    from wikift.data.store import Encoded, write_store

    store, run = made
    one = write_store(
        tmp_path / "one",
        {"validation": [Encoded(np.array([5], np.uint16), 1, 2, 1)]},
        vocab_size=store.vocab_size,
        eos_token_id=0,
        tokenizer_fingerprint=store.tokenizer_fingerprint,
    )
    with pytest.raises(UserError, match="no token to predict"):
        main([str(run), "--data", str(one.path)])
    with pytest.raises(UserError, match="no token to predict"):
        score(one, load_model(str(exported(run))), context=8, stride=8)
