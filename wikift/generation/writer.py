"""Prompts to text: one streamed, or a batch at once that gives what each prompt gets alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, GPT2LMHeadModel
from transformers.utils import logging as transformers_logging

from wikift.base.errors import UserError
from wikift.base.world import start_world
from wikift.generation.decoder import Decoder
from wikift.generation.sampler import ROUNDING, Sampling, choose, penalise, uniforms
from wikift.generation.stream import Stream
from wikift.model.gpt2 import DTYPES, load_model, resolve_precision
from wikift.settings.fields import GenerateSettings


@dataclass(frozen=True)
class Answer:
    """What followed on a prompt. `finish_reason` is stop (end of text), stop_string, length or interrupted.

    `seconds` are those of the whole batch up to this answer's end; `slides` counts how often the context was full and
    its first half was dropped; `logprobs` has (token's text, log-probability under the model itself) for each token.
    """

    prompt: str
    text: str
    prompt_tokens: int
    new_tokens: int
    seconds: float
    finish_reason: str
    slides: int = 0
    sequence: int = 0
    logprobs: list[tuple[str, float]] | None = None


@dataclass
class _Row:
    """One sequence that is being written."""

    answer: int  # its place among the answers of its batch
    prompt: str
    prompt_tokens: int
    sequence: int
    random: Any
    stream: Stream
    logprobs: list[tuple[str, float]]


def load_writer(
    source: str,
    device: str,
    precision: str = "fp32",
    compile: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Writer:
    """The model and tokenizer of a directory or Hub name. Raises UserError where they do not fit each other."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    place = start_world(device).device
    if compile:
        from wikift.engines.build import check_compiler  # and with it all of training

        check_compiler(place)
    model = load_model(source, place, "MODEL", say)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        words = " ".join(str(error).split())[:200]
        raise UserError(f"{source}: its tokenizer cannot be loaded ({words}); name a folder that has one") from None
    size = 1 + max(tokenizer.get_vocab().values())
    if size > model.config.vocab_size:
        raise UserError(
            f"{source}: its tokenizer has {size} tokens, its model {model.config.vocab_size}; "
            "they do not belong together, name another folder"
        )
    found = resolve_precision(precision, place)
    model = model.to(dtype=DTYPES[found.name])  # type: ignore[call-arg]
    return Writer(model, tokenizer, compile=compile, warning=found.warning)


class Writer:
    """A model, whose weights it may lay out anew in memory, and its tokenizer, ready to answer."""

    def __init__(self, model: GPT2LMHeadModel, tokenizer: Any, *, compile: bool = False, warning: str = "") -> None:
        self.model: Any = model
        self.tokenizer, self.warning = tokenizer, warning
        self.device, self.dtype = model.device, model.dtype
        self.parameters = model.num_parameters()
        self.positions: int = model.config.n_positions
        end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else model.config.eos_token_id
        self.end_of_text: int = end if isinstance(end, int) else 0
        # a published model's own sampling defaults must not mix with the user's settings
        self.model.generation_config = GenerationConfig(eos_token_id=self.end_of_text, pad_token_id=self.end_of_text)
        self.decoder = Decoder(model, relayout=True, compile=compile)

    def answer(self, prompt: str, settings: GenerateSettings, number: int, **callbacks: Any) -> Answer:
        """Go on from `prompt`; `number` counts the answers under one seed. The callbacks are those of `answers`."""
        return self.answers([(number, prompt)], settings, **callbacks)[0]

    def answers(
        self,
        prompts: Sequence[tuple[int, str]],
        settings: GenerateSettings,
        *,
        write: Callable[[str], None] = lambda text: None,
        note: Callable[[str], None] = lambda text: None,
        stopped: Callable[[], bool] = lambda: False,
        echo: bool = False,
    ) -> list[Answer]:
        """Go on from each of `prompts` (number under the seed, text), all in one batch, `num_return_sequences` times.

        In fp32 an answer is what its prompt gets alone. `write` gets the text of a batch of one in whole characters,
        with `echo` behind the prompt. `note` is told of a prompt that is cut and of a context that will slide.
        `stopped` is asked after each token.
        """
        with torch.inference_mode():
            if settings.num_beams > 1:
                beams = [self._beams(prompt, settings, note) for _, prompt in prompts]
                for found in (answer for answers in beams for answer in answers):
                    write((found.prompt if echo else "") + found.text)
                return [answer for answers in beams for answer in answers]
            rows: list[_Row] = []
            windows: list[list[int]] = []
            for number, prompt in prompts:
                ids, window = self._window(prompt, settings, note)
                for sequence in range(settings.num_return_sequences):
                    random = uniforms(settings.seed, number, sequence)
                    stream = Stream(self.tokenizer, write, settings.stop)
                    rows.append(_Row(len(rows), prompt, len(ids), sequence, random, stream, []))
                    windows.append(window)
            if echo and len(rows) == 1:
                write(rows[0].prompt)
            return self._write(rows, windows, settings, stopped)

    def _write(
        self, rows: list[_Row], windows: list[list[int]], settings: GenerateSettings, stopped: Callable[[], bool]
    ) -> list[Answer]:
        started = time.perf_counter()
        sampling = _sampling(settings)
        answers: dict[int, Answer] = {}
        alone = len(rows) == 1
        logits = self.decoder.begin(windows, settings.max_new_tokens)
        seen = torch.zeros_like(logits, dtype=torch.bool) if sampling.repetition_penalty != 1 else None
        if seen is not None:
            for place, window in enumerate(windows):
                seen[place, window] = True
        while True:
            tokens = self._choose(logits, rows, sampling, seen)
            logprobs = _logprobs(logits, tokens) if settings.logprobs else None
            interrupted, going = False, []
            for place, (row, token) in enumerate(zip(rows, tokens, strict=True)):
                row.stream.take(token, show=alone or bool(settings.stop))
                if logprobs is not None:
                    row.logprobs.append((self.tokenizer.decode([token]), round(logprobs[place], 4)))
                interrupted = interrupted or stopped()
                reason = self._reason(row, settings, interrupted)
                if reason:
                    seconds = round(time.perf_counter() - started, 3)
                    answers[row.answer] = _answer(row, seconds, reason, self.decoder.slides[place])
                else:
                    going.append(place)
            if not going:
                return [answers[number] for number in sorted(answers)]
            if seen is not None:
                seen[range(len(rows)), tokens] = True
            logits = self.decoder.advance(tokens)
            if len(going) < len(rows):
                rows, logits = [rows[place] for place in going], logits[going]
                seen = seen[going] if seen is not None else None
                self.decoder.keep(going)

    def _choose(
        self, logits: torch.Tensor, rows: list[_Row], sampling: Sampling, seen: torch.Tensor | None
    ) -> list[int]:
        """A token for each row; where rounding could decide, from logits of that row's text by itself."""
        drawn = torch.tensor([next(row.random) for row in rows], dtype=torch.float64)
        rounding = ROUNDING if self.dtype == torch.float32 else 0.0

        def pick(logits: torch.Tensor, chosen: slice, rounding: float) -> tuple[list[int], list[int]]:
            if seen is not None:
                logits = penalise(logits, seen[chosen], sampling.repetition_penalty)
            return choose(logits, sampling, drawn[chosen], rounding)

        tokens, doubtful = pick(logits, slice(None), rounding)
        for row in doubtful:
            ((tokens[row],), _) = pick(self.decoder.alone(row), slice(row, row + 1), 0.0)
        return tokens

    def _reason(self, row: _Row, settings: GenerateSettings, interrupted: bool) -> str:
        if row.stream.ids[-1] == self.end_of_text:
            return "stop"
        if row.stream.stopped:
            return "stop_string"
        if len(row.stream.ids) >= settings.max_new_tokens:
            return "length"
        return "interrupted" if interrupted else ""

    def _window(
        self, prompt: str, settings: GenerateSettings, note: Callable[[str], None]
    ) -> tuple[list[int], list[int]]:
        """The prompt's tokens, at least one, and those of them that are read: all, or the last of a long one."""
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"] or [self.end_of_text]
        window, wanted = ids, settings.max_new_tokens
        if len(ids) >= self.positions:
            window = ids[-(self.positions - min(wanted, self.positions // 2)) :]
            note(
                f"the prompt has {len(ids):,} tokens, the model's context is {self.positions:,}: "
                f"only its last {len(window):,} are read"
            )
        if settings.num_beams == 1 and len(window) + wanted > self.positions:
            note(
                f"prompt and answer may pass the model's context of {self.positions:,} tokens: it slides then, "
                f"and only the last {max(1, self.positions // 2):,} are read on"
            )
        return ids, window

    def _beams(self, prompt: str, settings: GenerateSettings, note: Callable[[str], None]) -> list[Answer]:
        """Beam search, which is transformers'. It ends where the model's context does."""
        started = time.perf_counter()
        ids, window = self._window(prompt, settings, note)
        room = self.positions - len(window)
        if settings.max_new_tokens > room:
            note(
                f"at most {room:,} new tokens instead of {settings.max_new_tokens:,}: beams do not slide, and the "
                f"model's context is {self.positions:,}"
            )
        inputs = torch.tensor([window], device=self.device)  # (1, prompt tokens)
        config = GenerationConfig(
            num_beams=settings.num_beams, num_return_sequences=settings.num_return_sequences, do_sample=False,
            max_new_tokens=min(settings.max_new_tokens, room), repetition_penalty=settings.repetition_penalty,
            eos_token_id=self.end_of_text, pad_token_id=self.end_of_text,
        )  # fmt: skip
        found = self.model.generate(inputs, attention_mask=torch.ones_like(inputs), generation_config=config)
        answers = []
        for sequence, new in enumerate(found[:, inputs.shape[1] :].tolist()):
            ended = self.end_of_text in new
            new = new[: new.index(self.end_of_text) + 1] if ended else new
            stream = Stream(self.tokenizer, lambda text: None)
            stream.ids = new
            row = _Row(0, prompt, len(ids), sequence, None, stream, [])
            seconds = round(time.perf_counter() - started, 3)
            answers.append(_answer(row, seconds, "stop" if ended else "length", 0))
        return answers


def _sampling(settings: GenerateSettings) -> Sampling:
    return Sampling(settings.temperature, settings.top_k, settings.top_p, settings.repetition_penalty)


def _answer(row: _Row, seconds: float, reason: str, slides: int) -> Answer:
    text, count = row.stream.finish(), len(row.stream.ids)
    logprobs = row.logprobs or None
    return Answer(row.prompt, text, row.prompt_tokens, count, seconds, reason, slides, row.sequence, logprobs)


def _logprobs(logits: torch.Tensor, tokens: list[int]) -> list[float]:
    found: list[float] = logits.log_softmax(-1)[range(len(tokens)), tokens].tolist()
    return found
