"""Prompts to text: one streamed, or a batch in which each prompt gets the answer that it gets alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GPT2LMHeadModel

from wikift.base import hub
from wikift.base.errors import UserError
from wikift.base.world import start_world
from wikift.data.tokenizer import by_transformers
from wikift.generation.decoder import Decoder
from wikift.generation.sampler import ROUNDING, Sampling, choose, penalise, uniforms
from wikift.generation.stream import Stream
from wikift.model.gpt2 import DTYPES, load_model, resolve_precision


@dataclass(frozen=True)
class Answer:
    """What follows a prompt. `finish_reason` is stop (end of text), stop_string, length or interrupted.

    `seconds` are those of the batch up to this answer's end; `slides` counts how often the context was full and its
    first half was dropped.
    """

    prompt: str
    text: str
    prompt_tokens: int
    new_tokens: int
    seconds: float
    finish_reason: str
    slides: int = 0
    sequence: int = 0


@dataclass
class _Row:
    prompt: str
    prompt_tokens: int
    window: list[int]  # the prompt's tokens that are read
    sequence: int
    stream: Stream
    uniforms: Iterator[float]


def load_writer(
    source: str, device: str, precision: str = "fp32", say: Callable[[str], None] = lambda line: None
) -> Writer:
    """The model and tokenizer of a directory or Hub name. Raises UserError where they do not match."""
    hub.quiet_libraries()
    hardware = start_world(device).device
    model = load_model(source, hardware, "MODEL", say)
    tokenizer = by_transformers(source, "MODEL")
    size = 1 + max(tokenizer.get_vocab().values())
    if size > model.config.vocab_size:
        raise UserError(
            f"{source}: its tokenizer has {size} tokens, its model {model.config.vocab_size}; "
            "they do not match; name another folder"
        )
    resolved = resolve_precision(precision, hardware)
    model = model.to(dtype=DTYPES[resolved.name])  # type: ignore[call-arg]
    if resolved.warning:
        say(resolved.warning)
    say(f"{source}, {model.num_parameters():,} parameters on {model.device}")
    return Writer(model, tokenizer)


class Writer:
    """A model, whose head may be laid out differently in memory, and its tokenizer, ready to answer."""

    def __init__(self, model: GPT2LMHeadModel, tokenizer: Any) -> None:
        self.tokenizer, self.positions = tokenizer, int(model.config.n_positions)
        self.rounding = ROUNDING if model.dtype == torch.float32 else 0.0
        end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else model.config.eos_token_id
        self.end_of_text: int = end if isinstance(end, int) else 0
        self.decoder = Decoder(model)

    @torch.inference_mode()
    def answers(
        self,
        prompts: Sequence[tuple[int, str]],
        sampling: Sampling,
        *,
        write: Callable[[str], None] = lambda text: None,
        note: Callable[[str], None] = lambda text: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> list[Answer]:
        """Continue each of `prompts` (number under the seed, text), all in one batch, `num_return_sequences` times.

        In fp32 an answer is what its prompt gets alone. `write` gets the text of a batch of one as it is made, `note`
        what does not fit the context. `stopped` is asked after each token.
        """
        rows = []
        for number, prompt in prompts:
            ids, window = self._window(prompt, sampling, note)
            for sequence in range(sampling.num_return_sequences):
                stream = Stream(self.tokenizer, write, sampling.stop)
                random = uniforms(sampling.seed, number, sequence)
                rows.append(_Row(prompt, len(ids), window, sequence, stream, random))
        started = time.perf_counter()
        answers: list[Answer | None] = [None] * len(rows)
        active = list(range(len(rows)))  # the numbers of the decoder's rows
        logits = self.decoder.begin([row.window for row in rows], sampling.max_new_tokens)
        while active:
            tokens = self._choose(logits, [rows[number] for number in active], sampling)
            interrupted = stopped()
            unfinished = []
            for column, (number, token) in enumerate(zip(active, tokens, strict=True)):
                row = rows[number]
                row.stream.take(token, show=len(rows) == 1 or bool(sampling.stop))
                if reason := self._reason(row.stream, sampling, interrupted):
                    text, count, seconds = row.stream.finish(), len(row.stream.ids), time.perf_counter() - started
                    facts = (round(seconds, 3), reason, self.decoder.slides[column], row.sequence)
                    answers[number] = Answer(row.prompt, text, row.prompt_tokens, count, *facts)
                else:
                    unfinished.append(column)
            if unfinished:
                logits = self.decoder.advance(tokens)
                if len(unfinished) < len(active):
                    logits = logits[unfinished]
                    self.decoder.keep(unfinished)
            active = [active[column] for column in unfinished]
        return [answer for answer in answers if answer is not None]

    def _choose(self, logits: torch.Tensor, rows: list[_Row], sampling: Sampling) -> list[int]:
        """A token for each row; where rounding could decide, from logits of that row's text by itself."""
        drawn = torch.tensor([next(row.uniforms) for row in rows], dtype=torch.float64)
        texts = [row.window + row.stream.ids for row in rows]
        tokens, doubtful = choose(penalise(logits, texts, sampling.repetition_penalty), sampling, drawn, self.rounding)
        for row in doubtful:
            alone = penalise(self.decoder.alone(row), [texts[row]], sampling.repetition_penalty)
            tokens[row] = choose(alone, sampling, drawn[row : row + 1], 0.0)[0][0]
        return tokens

    def _reason(self, stream: Stream, sampling: Sampling, interrupted: bool) -> str:
        if stream.ids[-1] == self.end_of_text:
            return "stop"
        if stream.stopped:
            return "stop_string"
        if len(stream.ids) >= sampling.max_new_tokens:
            return "length"
        return "interrupted" if interrupted else ""

    def _window(self, prompt: str, sampling: Sampling, note: Callable[[str], None]) -> tuple[list[int], list[int]]:
        """The prompt's tokens, at least one, and those of them that are read: all, or the last of a long one."""
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"] or [self.end_of_text]
        window, wanted = ids, sampling.max_new_tokens
        if len(ids) >= self.positions:
            window = ids[-(self.positions - min(wanted, self.positions // 2)) :]
            note(
                f"the prompt has {len(ids):,} tokens, the model's context is {self.positions:,}: "
                f"only its last {len(window):,} tokens are used"
            )
        if len(window) + wanted > self.positions:
            note(
                f"prompt and answer may exceed the model's context of {self.positions:,} tokens; "
                f"then only the last {max(1, self.positions // 2):,} tokens are kept"
            )
        return ids, window
