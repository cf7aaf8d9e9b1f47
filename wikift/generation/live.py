"""Samples from a model that is in training, sharded or not, without moving anything of the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from wikift.generation.sampler import Sampling, choose, penalise, uniforms
from wikift.generation.stream import Stream

Logits = Callable[[Tensor, Tensor, Tensor], Tensor]  # an engine's next_logits
SAMPLING = Sampling(temperature=0.8, top_k=50, top_p=0.95, repetition_penalty=1.1)


def sample_live(
    next_logits: Logits,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    sampling: Sampling,
    max_new_tokens: int,
    seed: int,
    positions: int,
) -> list[str]:
    """Texts that follow on `prompts` from a model in training, sharded or not; collective.

    Draws from streams of its own and leaves torch's generators as they were. It asks for logits `max_new_tokens` times
    on every rank, whatever is written, so that all ranks meet in the same collectives, and always of the same shape, so
    that nothing is compiled anew; there is no cache, as a sharded module knows none.
    """
    end: int = tokenizer.eos_token_id
    windows = [(tokenizer(prompt, add_special_tokens=False)["input_ids"] or [end])[-positions:] for prompt in prompts]
    length = min(positions, max(map(len, windows)) + max_new_tokens)
    streams = [uniforms(seed, number) for number in range(len(prompts))]
    new: list[list[int]] = [[] for _ in prompts]
    for _ in range(max_new_tokens):
        logits = next_logits(*_padded([window[-length:] for window in windows], length)).cpu()
        if sampling.repetition_penalty != 1:
            seen = torch.zeros_like(logits, dtype=torch.bool)
            for row, window in enumerate(windows):
                seen[row, window] = True
            logits = penalise(logits, seen, sampling.repetition_penalty)
        drawn = torch.tensor([next(stream) for stream in streams], dtype=torch.float64)
        for window, written, token in zip(windows, new, choose(logits, sampling, drawn, 0.0)[0], strict=True):
            window.append(token)
            written.append(token)
    texts = []
    for written in new:
        stream = Stream(tokenizer, lambda text: None)
        stream.ids = written[: written.index(end)] if end in written else written
        texts.append(stream.finish())
    return texts


def _padded(windows: list[list[int]], length: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, mask, positions), each (rows, length), padded on the left."""
    padding = torch.tensor([length - len(window) for window in windows])
    ids = torch.tensor([[0] * (length - len(window)) + window for window in windows])
    places = torch.arange(length) - padding[:, None]
    return ids, (places >= 0).long(), places.clamp(min=0)
