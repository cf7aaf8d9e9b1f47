"""Samples from a model that is in training, sharded or not, without moving anything of the run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from wikift.choose import Sampling, choose, penalise, uniforms
from wikift.stream import Stream


def sample_live(
    model: torch.nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    sampling: Sampling,
    max_new_tokens: int,
    seed: int,
    positions: int,
    device: torch.device,
) -> list[str]:
    """Texts that follow on `prompts` from a model in training, called as a `GPT2LMHeadModel`, sharded or not.

    Draws from streams of its own and leaves torch's generators, gradients and the training mode as they were. It calls
    the module `max_new_tokens` times on every rank, whatever is written, so that all ranks meet in the same
    collectives; there is no cache, as a wrapped module may know none. Memory: logits of the whole batch.
    """
    end: int = tokenizer.eos_token_id
    windows = [(tokenizer(prompt, add_special_tokens=False)["input_ids"] or [end])[-positions:] for prompt in prompts]
    streams = [uniforms(seed, number) for number in range(len(prompts))]
    new: list[list[int]] = [[] for _ in prompts]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for _ in range(max_new_tokens):
                logits = _live_logits(model, [window[-positions:] for window in windows], device)
                if sampling.repetition_penalty != 1:
                    seen = torch.zeros_like(logits, dtype=torch.bool)
                    for row, window in enumerate(windows):
                        seen[row, window] = True
                    logits = penalise(logits, seen, sampling.repetition_penalty)
                drawn = torch.tensor([next(stream) for stream in streams], dtype=torch.float64)
                for window, written, token in zip(windows, new, choose(logits, sampling, drawn, 0.0)[0], strict=True):
                    window.append(token)
                    written.append(token)
    finally:
        model.train(training)
    texts = []
    for written in new:
        stream = Stream(tokenizer, lambda text: None)
        stream.ids = written[: written.index(end)] if end in written else written
        texts.append(stream.finish())
    return texts


def _live_logits(model: torch.nn.Module, windows: list[list[int]], device: torch.device) -> torch.Tensor:
    """Logits (rows, vocabulary) after windows padded on the left."""
    length = max(len(window) for window in windows)
    padding = [length - len(window) for window in windows]
    ids = torch.tensor([[0] * pad + window for pad, window in zip(padding, windows, strict=True)], device=device)
    places = torch.arange(length, device=device) - torch.tensor(padding, device=device)[:, None]
    found = model(input_ids=ids, attention_mask=(places >= 0).long(), position_ids=places.clamp(min=0), use_cache=False)
    return found.logits[:, -1].float()  # type: ignore[no-any-return]
