"""Samples from a model in training, sharded or not, without a change to the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from wikift.generation.sampler import Sampling, choose, penalise, uniforms
from wikift.generation.stream import decode

Logits = Callable[[Tensor, Tensor, Tensor], Tensor]  # an engine's next_logits
SAMPLING = Sampling(max_new_tokens=64, temperature=0.8, top_k=50, top_p=0.95, repetition_penalty=1.1)


def sample_live(
    next_logits: Logits, tokenizer: Any, prompts: Sequence[str], *, sampling: Sampling, positions: int
) -> list[str]:
    """Texts that continue `prompts`; collective. Draws from its own random streams, never torch's generators.

    Every rank asks for logits `max_new_tokens` times, whatever is written, so that all meet in the same collectives,
    and always of the same shape, so that nothing is compiled again; a sharded module has no cache.
    """
    end: int = tokenizer.eos_token_id
    prompt_ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] or [end] for prompt in prompts]
    texts = [ids[-positions:] for ids in prompt_ids]
    length = min(positions, max(map(len, texts)) + sampling.max_new_tokens)
    randoms = [uniforms(sampling.seed, number) for number in range(len(prompts))]
    for _ in range(sampling.max_new_tokens):
        logits = next_logits(*_padded([text[-length:] for text in texts], length)).cpu()
        drawn = torch.tensor([next(random) for random in randoms], dtype=torch.float64)
        penalised = penalise(logits, texts, sampling.repetition_penalty)
        for text, token in zip(texts, choose(penalised, sampling, drawn, 0.0)[0], strict=True):
            text.append(token)
    answers = [text[-sampling.max_new_tokens :] for text in texts]
    return [decode(tokenizer, ids[: ids.index(end)] if end in ids else ids) for ids in answers]


def _padded(texts: list[list[int]], length: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, mask, position ids), each (rows, length), padded on the left."""
    padding = torch.tensor([length - len(text) for text in texts])
    ids = torch.tensor([[0] * (length - len(text)) + text for text in texts])
    position_ids = torch.arange(length) - padding[:, None]
    return ids, (position_ids >= 0).long(), position_ids.clamp(min=0)
