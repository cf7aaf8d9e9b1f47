"""The decoder, the choice of a token, batches as each prompt alone. Run: pytest tests/generation/test_decoder.py"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests.trained import SENTENCES
from wikift.data.tokenizer import train
from wikift.engines.single import in_eval
from wikift.generation.decoder import Decoder
from wikift.generation.live import sample_live
from wikift.generation.sampler import ROUNDING, Sampling, choose, penalise, uniforms
from wikift.generation.writer import Answer, Writer
from wikift.model.gpt2 import NextTokenLoss

SHAPE: dict[str, Any] = {"n_layer": 3, "n_head": 4, "n_embd": 64, "n_positions": 48, "vocab_size": 320}


def random_model(seed: int = 0, **words: Any) -> GPT2LMHeadModel:
    """Weights so large that every token tells in what follows."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(**{**SHAPE, "initializer_range": 0.3, **words})).eval()  # type: ignore[no-any-return]


@pytest.fixture(scope="module", autouse=True)
def _as_with_several_threads() -> Iterator[None]:
    """Products of few rows are split here as where a user has several cores; test_generate.py has one thread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 2)
        patch.setattr(torch.backends.mkl, "is_available", lambda: True)
        yield


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    train(SENTENCES, 320, folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    return random_model()


@pytest.fixture(scope="module")
def writer(model: GPT2LMHeadModel, tokenizer: Any) -> Writer:
    return Writer(model, tokenizer)


def drawing(**values: Any) -> Sampling:
    """The command's own defaults, but for `values`."""
    return Sampling(**{"temperature": 0.8, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.1, **values})


def texts(count: int, longest: int = 60) -> list[tuple[int, str]]:
    """Prompts of mixed length, some empty, some longer than the model's context."""
    random = np.random.default_rng(1)
    long = " ".join(SENTENCES) * 4
    starts, sizes = random.integers(0, 300, count), random.integers(0, longest, count)
    return [(number, long[s : s + n]) for number, (s, n) in enumerate(zip(starts, sizes, strict=True))]


def alone(writer: Writer, prompt: str, sampling: Sampling, number: int = 0, **callbacks: Any) -> Answer:
    return writer.answers([(number, prompt)], sampling, **callbacks)[0]


def without_time(answers: list[Answer]) -> list[Answer]:
    return [dataclasses.replace(answer, seconds=0.0) for answer in answers]


# --- the forward ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        {},
        {"activation_function": "relu", "scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False, "activation_function": "gelu"},
        {"tie_word_embeddings": False},
    ],
    ids=["gpt2", "inverse-layer-relu", "unscaled-gelu", "untied"],
)
def test_logits_are_the_models_own(words: dict[str, Any]) -> None:
    model = random_model(**words)
    windows = [[5, 6, 7, 8, 9], [1], [3, 2, 1]]
    new = [[4, 4, 4], [10, 11, 12], [30, 20, 10]]
    expected = []
    with torch.no_grad():
        for window, tokens in zip(windows, new, strict=True):
            expected.append([model(torch.tensor([window + tokens[:k]])).logits[0, -1] for k in range(4)])
        before = model(torch.tensor([[1, 2, 3]])).logits
        decoder = Decoder(model)
        found = [decoder.begin(windows, 4)]
        for k in range(3):
            found.append(decoder.advance([tokens[k] for tokens in new]))
        for k in range(4):
            for row in range(3):
                torch.testing.assert_close(found[k][row], expected[row][k], rtol=1e-4, atol=1e-4)
                if k == 3:
                    torch.testing.assert_close(decoder.alone(row)[0], expected[row][k], rtol=1e-4, atol=1e-4)
        # other products of the same weights are rounded otherwise, no more than that
        torch.testing.assert_close(model(torch.tensor([[1, 2, 3]])).logits, before, rtol=1e-4, atol=1e-4)


def test_new_layout_takes_no_second_copy_and_keeps_the_tie() -> None:
    model = random_model()
    bytes_before = sum(p.untyped_storage().nbytes() for p in set(model.parameters()))
    decoder = Decoder(model)
    assert model.transformer.wte.weight is model.lm_head.weight
    assert decoder.head.is_contiguous()
    assert decoder.head.data_ptr() == model.lm_head.weight.data_ptr()
    assert sum(p.untyped_storage().nbytes() for p in set(model.parameters())) == bytes_before


def test_rows_that_slide_rows_that_stay_and_rows_that_leave() -> None:
    """Each row's logits are those of its own window all the time, in one batch over more than two contexts."""
    model = random_model()
    decoder = Decoder(model)
    random = np.random.default_rng(3)
    windows = [random.integers(0, 320, size).tolist() for size in (48, 1, 30, 47)]
    texts = {row: list(window) for row, window in enumerate(windows)}
    alive = [0, 1, 2, 3]
    with torch.no_grad():
        decoder.begin(windows, 1000)
        for step in range(120):
            tokens = random.integers(0, 320, len(alive)).tolist()
            logits = decoder.advance(tokens)
            for place, row in enumerate(alive):
                texts[row].append(tokens[place])
                window = decoder.windows[place]
                assert window == texts[row][-len(window) :]
                assert 24 <= len(window) <= 48 or len(window) == len(texts[row])
                expected = model(torch.tensor([window])).logits[0, -1]
                torch.testing.assert_close(logits[place], expected, rtol=1e-3, atol=1e-3)
            if step in (40, 80):
                decoder.keep([2, 0] if step == 40 else [1])
                alive = [alive[2], alive[0]] if step == 40 else [alive[1]]
    assert alive == [0]
    assert decoder.slides == [5]


# --- the choice ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [(0.7, 5, 1.0), (1.3, 0, 0.8), (1.0, 20, 0.6), (1.0, 0, 1.0), (0.5, 1000, 0.999)])
def test_tokens_are_drawn_as_transformers_distribution_says(words: tuple[float, int, float]) -> None:
    temperature, top_k, top_p = words
    torch.manual_seed(0)
    logits = torch.randn(1, 40) * 2
    wanted: Tensor = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        wanted = TopKLogitsWarper(top_k)(None, wanted)
    if top_p < 1:
        wanted = TopPLogitsWarper(top_p)(None, wanted)
    expected = wanted.softmax(-1)[0]
    count = 20_000
    drawn = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens, _ = choose(logits.expand(count, -1), Sampling(temperature, top_k, top_p), drawn)
    found = torch.bincount(torch.tensor(tokens), minlength=40) / count
    # evenly spread numbers hit each token as often as it is likely, but for its two borders
    torch.testing.assert_close(found, expected, rtol=0, atol=2 / count)


def test_the_penalty_is_transformers_own() -> None:
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 30), torch.tensor([[1, 2, 3, 3], [4, 5, 6, 7]])
    assert torch.equal(penalise(logits, ids.tolist(), 1.4), RepetitionPenaltyLogitsProcessor(1.4)(ids, logits))


@pytest.mark.parametrize(
    "sampling",
    [Sampling(0), Sampling(1.0, 5), Sampling(0.7, 0, 0.8), Sampling(1.5, 10, 0.7), Sampling()],
    ids=["greedy", "top-k", "top-p", "both", "all"],
)
def test_whatever_rounding_can_change_is_doubtful(sampling: Sampling) -> None:
    """Logits with many near-ties, moved by less than ROUNDING: where the token differs, both or either were doubted."""
    torch.manual_seed(0)
    logits = (torch.randn(4000, 30) * 4).round(decimals=1) + torch.rand(4000, 30) * 2e-5
    moved = logits + (torch.rand(4000, 30) - 0.5) * ROUNDING * logits.abs().amax(-1, keepdim=True) * 0.5
    drawn = torch.rand(4000, dtype=torch.float64)
    one, doubts = choose(logits, sampling, drawn)
    two, _ = choose(moved, sampling, drawn)
    differing = {row for row, (a, b) in enumerate(zip(one, two, strict=True)) if a != b}
    assert differing <= set(doubts)
    assert len(doubts) < 4000
    if sampling != Sampling():
        assert differing, "the near-ties are near enough"
    assert choose(logits, sampling, drawn, 0.0) == (one, [])


def test_random_streams_are_their_own() -> None:
    def first(*words: int) -> list[float]:
        stream = uniforms(*words)
        return [next(stream) for _ in range(5)]

    torch.manual_seed(1)
    before = torch.get_rng_state()
    streams = [first(1, 0), first(1, 1), first(2, 0), first(1, 0, 1)]
    assert torch.equal(before, torch.get_rng_state())
    assert first(1, 0) == streams[0] == first(1, 0, 0)
    assert len({value for stream in streams for value in stream}) == 20
    assert all(0 <= value < 1 for stream in streams for value in stream)


# --- batches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [{"temperature": 0.0, "repetition_penalty": 1.0}, {"temperature": 0.0}, {}, {"top_k": 0, "top_p": 1.0}],
    ids=["greedy", "greedy-penalty", "sampled", "sampled-from-all"],
)
def test_60_prompts_in_one_batch_give_what_each_gives_alone(writer: Writer, values: dict[str, Any]) -> None:
    settings = drawing(max_new_tokens=12, **values)
    prompts = texts(60)
    together = without_time(writer.answers(prompts, settings))
    assert together == without_time([alone(writer, prompt, settings, number) for number, prompt in prompts])
    assert len({answer.text for answer in together}) > 40
    assert len({answer.prompt_tokens for answer in together}) > 15


def test_near_ties_are_decided_by_the_text_alone(tokenizer: Any) -> None:
    """Two tokens of one embedding: their logits differ by rounding only, in a batch otherwise than alone."""
    model = random_model()
    with torch.no_grad():  # pairs of equal direction whose lengths differ in the last bits
        weight = model.transformer.wte.weight
        weight[161:320:2] = weight[160:320:2] * (1 + 1e-7)
    writer = Writer(model, tokenizer)
    settings = drawing(max_new_tokens=16, temperature=0, repetition_penalty=1.0)
    prompts = texts(32)
    asked: list[int] = []
    by_itself = writer.decoder.alone

    def counted(row: int) -> Tensor:
        asked.append(row)
        return by_itself(row)

    writer.decoder.alone = counted  # type: ignore[method-assign]
    together = without_time(writer.answers(prompts, settings))
    doubts = len(asked)
    assert together == without_time([alone(writer, prompt, settings, number) for number, prompt in prompts])
    assert doubts > 50


def test_several_sequences_of_a_prompt(writer: Writer) -> None:
    one = writer.answers([(0, "The"), (1, "Maria")], drawing(max_new_tokens=8))
    three = writer.answers([(0, "The"), (1, "Maria")], drawing(max_new_tokens=8, num_return_sequences=3))
    assert [(answer.prompt, answer.sequence) for answer in three] == [
        (p, k) for p in ("The", "Maria") for k in range(3)
    ]
    assert [answer.text for answer in three[::3]] == [answer.text for answer in one], "the first is what one alone is"
    assert len({answer.text for answer in three}) == 6


def test_a_text_longer_than_the_context_slides_and_says_so(writer: Writer) -> None:
    notes: list[str] = []
    settings = drawing(max_new_tokens=150, temperature=0, repetition_penalty=1.0)
    answer = alone(writer, "Paris", settings, note=notes.append)
    assert (answer.new_tokens, answer.finish_reason) == (150, "length")
    assert answer.slides == 5
    assert notes == [
        "prompt and answer may exceed the model's context of 48 tokens; then only the last 24 tokens are kept"
    ]


def test_a_stop_string_ends_only_its_own_row(writer: Writer) -> None:
    settings = drawing(max_new_tokens=20)
    plain = writer.answers(texts(20), settings)
    stop = next(answer.text[3:5] for answer in plain if len(answer.text) > 8)
    stopped = writer.answers(texts(20), dataclasses.replace(settings, stop=(stop,)))
    ended = [answer for answer in stopped if answer.finish_reason == "stop_string"]
    assert 0 < len(ended) < 20
    for whole, cut in zip(plain, stopped, strict=True):
        assert cut.text == whole.text.partition(stop)[0]
        assert (cut.finish_reason == "stop_string") == (stop in whole.text)
        assert cut.new_tokens <= whole.new_tokens


def test_bf16_weights(tokenizer: Any) -> None:
    writer = Writer(random_model().to(torch.bfloat16), tokenizer)
    one = writer.answers(texts(5), drawing(max_new_tokens=6))
    assert [answer.new_tokens for answer in one] == [6] * 5
    assert without_time(one) == without_time(writer.answers(texts(5), drawing(max_new_tokens=6)))


def test_a_model_in_training_writes_and_nothing_of_the_run_moves(tokenizer: Any, writer: Writer) -> None:
    model = random_model(resid_pdrop=0.5)
    model.train()
    state, weights = torch.get_rng_state(), [p.clone() for p in model.parameters()]
    sampling = drawing(max_new_tokens=10)
    prompts = [prompt for _, prompt in texts(6, longest=20)]

    def sample() -> list[str]:
        def logits(ids: torch.Tensor, *mask_and_positions: torch.Tensor) -> torch.Tensor:
            return in_eval(NextTokenLoss(model), model.device, ids, None, *mask_and_positions)

        return sample_live(logits, tokenizer, prompts, sampling=sampling, positions=48)

    found = sample()
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(a, b) and a.grad is None for a, b in zip(model.parameters(), weights, strict=True))
    assert found == sample()
    # what launch/generate.py writes from the same weights
    assert found == [alone(writer, prompt, sampling, number).text for number, prompt in enumerate(prompts)]
