"""Windows, sums over ranks, what one sum tells. Run: pytest tests/evaluation/test_score.py"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tests.ranks import run_ranks
from tests.trained import text_store
from wikift.base.world import World, start_world
from wikift.data.store import TokenStore, open_store
from wikift.evaluation.score import IGNORED, Piece, Score, difference, document_sums, score_split, stored, windows
from wikift.model.gpt2 import NextTokenLoss, make_model, model_config

Call = tuple[tuple[int, ...], int, float]  # shape, targets to score, sum


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return text_store(tmp_path_factory.mktemp("score") / "store")


@given(tokens=st.integers(0, 70), width=st.integers(2, 12), data=st.data())
def test_every_token_but_the_first_is_scored_once_behind_its_context(
    tokens: int, width: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, width))
    sizes = data.draw(st.lists(st.integers(1, 9), max_size=20))
    ends = [end for end in np.cumsum(sizes).tolist() if end < tokens]
    ids = np.arange(tokens)  # an id tells its position
    source = [Piece(part, np.full(len(part), n), False) for n, part in enumerate(np.split(ids, ends))]
    scored: list[int] = []
    for number, window in enumerate(windows(source, width, stride)):
        assert window.ids.tolist() == list(range(number * stride, min(number * stride + width, tokens)))
        assert window.documents.tolist() == [int(np.searchsorted(ends, i, "right")) for i in window.ids]
        predicted = window.ids[window.first :].tolist()
        assert predicted, "a window with nothing to score"
        # the full context, less what a stride takes; the very beginning has what is before it
        assert all(window.first + n >= min(position, width - stride) for n, position in enumerate(predicted))
        scored += predicted
    firsts = set(range(0, tokens, stride)) if stride == width else {0}  # disjoint blocks' own first tokens
    assert scored == [i for i in range(tokens) if i not in firsts]
    filled = list(windows(source, width, width - 1, fill=True))
    assert [i for window in filled for i in window.ids[window.first :].tolist()] == list(range(1, tokens))
    assert all(len(window.ids) == min(width, tokens) for window in filled)


def tiny_model(vocabulary: int = 320) -> Any:
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 32, "vocab_size": vocabulary}
    return make_model(model_config({**shape, "initializer_range": 0.2})).eval()


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


def scored(store: TokenStore, context: int, world: World = World(), batch: int = 4) -> tuple[Score, list[Call]]:  # noqa: B008
    calls: list[Call] = []
    losses = NextTokenLoss(tiny_model())

    def nll(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        assert inputs.dtype == targets.dtype == torch.int64
        with torch.no_grad():
            total: torch.Tensor = losses(inputs, targets)
        calls.append((tuple(inputs.shape), int((targets != IGNORED).sum()), float(total)))
        return total

    ids, split = store.tokens("validation"), store.splits["validation"]
    return score_split(nll, ids, split, context=context, batch=batch, world=world), calls


@pytest.mark.parametrize(("context", "stride"), [(32, 32), (32, 8), (32, 1), (7, 3), (1, 1)])
def test_the_sum_is_that_of_the_usual_loop(store: TokenStore, context: int, stride: int) -> None:
    ids = store.tokens("validation")
    expected = by_hand(tiny_model(), ids.tolist(), context, stride)
    for batch in (1, 3, 100):  # places the work only
        made = windows(stored(ids, [20, 50]), context + 1, stride)
        nll, counts = document_sums(NextTokenLoss(tiny_model()).by_token, made, batch=batch, world=World(),
                                    progress=lambda done: None)  # fmt: skip
        assert nll.sum() == pytest.approx(expected, rel=1e-6)
        assert counts.tolist() == [19, 30, len(ids) - 50]
        if stride == context:
            split, _ = scored(store, context, batch=batch)
            assert float(split.nll.sum()) == pytest.approx(expected, rel=1e-6)
            assert split.scored.tolist() == [len(ids) - 1]
            facts = store.splits["validation"]
            assert [split.words.tolist(), split.bytes.tolist()] == [[facts.words], [facts.bytes]]


def on_a_rank(path: Path) -> tuple[Score, list[Call]]:
    return scored(open_store(path), 32, start_world("cpu"), batch=1)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_windows_and_agree(store: TokenStore, ranks: int) -> None:
    alone, _ = scored(store, 32)
    answers = run_ranks(on_a_rank, ranks, store.path)
    for split, calls in answers:
        assert split.loss == answers[0][0].loss
        assert split.loss == pytest.approx(alone.loss, rel=1e-6)
        assert [shape for shape, _, _ in calls] == [(1, 32)] * len(answers[0][1]), "an engine's forward is collective"
    calls = [call for _, of_rank in answers for call in of_rank]
    assert sum(targets for _, targets, _ in calls) == len(store.tokens("validation")) - 1
    assert sum(targets > 0 for _, targets, _ in calls) == 7
    assert [total for _, targets, total in calls if not targets] == [0.0] * (-7 % ranks), "a rank without work"


def of(nll: Any, units: Any) -> Score:
    return Score(np.array(nll), *(np.array(units, np.float64) for _ in range(4)))


def test_one_sum_gives_all_the_measures() -> None:
    one = Score(*(np.array([n], np.float64) for n in (100, 50, 51, 40, 200)))  # a first token that nothing predicts
    assert one.loss == 2
    assert one.value("tokens") == pytest.approx(math.e**2)
    assert one.value("words") == pytest.approx(math.exp(2 * 51 / 40))
    assert one.value("bytes") == pytest.approx(math.exp(2 * 51 / 200))
    assert one.value("bits/byte") == pytest.approx(2 * 51 / 200 / math.log(2))
    assert of([1e6], [10]).value("tokens") == math.inf
    assert math.isnan(Score(*(np.array([n], np.float64) for n in (100, 50, 51, 0, 0))).value("words"))


def test_the_difference_is_paired() -> None:
    nll, units = np.array([10.0, 30.0, 20.0]), np.array([5.0, 15.0, 10.0])
    mean, error = difference(of(nll, units), of(nll + 0.1 * units, units), "tokens")
    assert (mean, error) == (pytest.approx(0.1), pytest.approx(0, abs=1e-12))
    mean, error = difference(of(nll, units), of(nll + np.array([1, 0, -1]), units), "words")
    assert (mean, error) == (0, pytest.approx((3 / 2 * 2) ** 0.5 / 30))
