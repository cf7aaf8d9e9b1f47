"""One prompt to one text, token by token, printed only in whole characters.

A byte-level token may end inside a character, so what is decoded from the tokens so far can end in U+FFFD. That one is
held back until the character is whole; all before it can no longer change. Cost: the text is decoded anew for every
token, 1 ms at 1,024 tokens, against 10 to 100 ms for the model's forward.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, GPT2LMHeadModel
from transformers.utils import logging as transformers_logging

from wikift.config import GenerateSettings
from wikift.errors import UserError
from wikift.model import load_model
from wikift.world import seed, start_world

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_GREEDY_BELOW = 1e-4  # logits divided by less leave fp32's range


@dataclass(frozen=True)
class Answer:
    """What followed on a prompt. `finish_reason` is stop (end of text), length or interrupted."""

    prompt: str
    text: str
    new_tokens: int
    seconds: float
    finish_reason: str


def load_writer(source: str, device: str) -> Writer:
    """The model and tokenizer of a directory or Hub name. Raises UserError where they do not fit each other."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    place = start_world(device).device
    model = load_model(source, place, "MODEL")
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
    return Writer(model, tokenizer)


class Writer:
    """A model and its tokenizer, ready to answer."""

    def __init__(self, model: GPT2LMHeadModel, tokenizer: Any) -> None:
        self.model: Any = model
        self.tokenizer = tokenizer
        self.device = model.device
        self.parameters = model.num_parameters()
        self.positions: int = model.config.n_positions
        end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else model.config.eos_token_id
        self.end_of_text: int = end if isinstance(end, int) else 0
        # a published model's own sampling defaults must not mix with the user's settings
        self.model.generation_config = _config(eos_token_id=self.end_of_text, pad_token_id=self.end_of_text)

    def answer(
        self,
        prompt: str,
        settings: GenerateSettings,
        number: int,
        *,
        write: Callable[[str], None] = lambda text: None,
        note: Callable[[str], None] = lambda text: None,
        stopped: Callable[[], bool] = lambda: False,
        echo: bool = False,
    ) -> Answer:
        """Go on from `prompt`; `number` counts the answers under one seed. `write` gets the text in whole characters,
        with `echo` behind the prompt.

        Where the prompt and the answer do not fit the model's context, the prompt's beginning or the answer's end is
        left out, and `note` says so. `stopped` is asked after each token.
        """
        ids, length = self._fit(self.tokenizer(prompt, add_special_tokens=False)["input_ids"], settings, note)
        if echo:
            write(prompt)
        stream = Stream(self.tokenizer, write, stopped)
        started = time.perf_counter()
        torch.manual_seed(seed(settings.seed, number))
        inputs = torch.tensor([ids], device=self.device)  # (1, prompt tokens)
        reason = "length"
        try:
            self.model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                generation_config=self._config(settings, length),
                streamer=stream,
            )
        except _Stopped:
            reason = "interrupted"
        if stream.ids and stream.ids[-1] == self.end_of_text:
            reason = "stop"
        return Answer(prompt, stream.text, len(stream.ids), round(time.perf_counter() - started, 3), reason)

    def _fit(self, ids: list[int], settings: GenerateSettings, note: Callable[[str], None]) -> tuple[list[int], int]:
        """Prompt tokens, at least one, and the number of new ones, together at most the model's positions."""
        ids = ids or [self.end_of_text]
        wanted = settings.max_new_tokens
        if len(ids) >= self.positions:
            kept = self.positions - min(wanted, self.positions // 2)
            note(
                f"the prompt has {len(ids):,} tokens, the model's context is {self.positions:,}: "
                f"only its last {kept:,} are read"
            )
            ids = ids[-kept:]
        room = self.positions - len(ids)
        if wanted > room:
            note(f"at most {room:,} new tokens instead of {wanted:,}: the model's context is {self.positions:,}")
        return ids, min(wanted, room)

    def _config(self, settings: GenerateSettings, length: int) -> GenerationConfig:
        sampling: dict[str, Any] = {"do_sample": False}
        if settings.temperature >= _GREEDY_BELOW:
            sampling = {
                "do_sample": True,
                "temperature": settings.temperature,
                "top_k": settings.top_k,
                "top_p": settings.top_p,
            }
        return _config(
            max_new_tokens=length,
            repetition_penalty=settings.repetition_penalty,
            eos_token_id=self.end_of_text,
            pad_token_id=self.end_of_text,
            use_cache=True,
            **sampling,
        )


def _config(**values: Any) -> GenerationConfig:
    return GenerationConfig(**values)


class _Stopped(Exception):
    """The user has read enough."""


class Stream:
    """transformers' streamer: `put` gets the prompt once and then each new token; `write` gets whole characters."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None], stopped: Callable[[], bool]) -> None:
        self.tokenizer, self.write, self.stopped = tokenizer, write, stopped
        self.ids: list[int] = []
        self.text = ""
        self._prompt_came = False

    def put(self, tokens: torch.Tensor) -> None:
        if not self._prompt_came:
            self._prompt_came = True
        else:
            self.ids += tokens.flatten().tolist()
            text = self.tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            whole = text.removesuffix(_REPLACEMENT)
            self.write(whole[len(self.text) :])
            self.text = whole
        if self.stopped():
            raise _Stopped

    def end(self) -> None:
        """Nothing is left to write: what is held back is never a whole character."""
