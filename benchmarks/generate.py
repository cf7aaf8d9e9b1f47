"""Tokens per second of transformers' `generate` and of wikift: greedy, fp32.

    python -m benchmarks.generate [--new-tokens 64] [--rounds 5]

A GPT-2 of 124M random weights continues prompts of 32 tokens, one at once and 32 at once, on a GPU where there is one
(--device); it is said how many rows' tokens differ. The first token's time is that of reading the prompt and choosing
one token, with all that a call does besides.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, GPT2Config, GPT2LMHeadModel

from benchmarks.harness import interleave, machine, options, table, write
from wikift.data.tokenizer import train
from wikift.generation.sampler import Sampling
from wikift.generation.writer import Writer

PROMPT_TOKENS = 32
Generate = Callable[[list[str], int], list[list[int]]]  # prompts, new tokens -> all tokens of each


def theirs(model: GPT2LMHeadModel, tokenizer: Any, prompts: list[str], new: int) -> list[list[int]]:
    ids = torch.tensor(tokenizer(prompts)["input_ids"], device=model.device)
    exactly = {"max_new_tokens": new, "min_new_tokens": new, "eos_token_id": None}
    config = GenerationConfig(**exactly, do_sample=False, pad_token_id=0)
    with torch.inference_mode():
        rows = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return rows.tolist()  # type: ignore[no-any-return]


def ours(writer: Writer, prompts: list[str], new: int) -> list[list[int]]:
    writer.answers(list(enumerate(prompts)), Sampling(temperature=0, max_new_tokens=new))
    return [list(window) for window in writer.decoder.windows]  # all but the last token, which nothing follows


def turn(generate: Generate, batches: Mapping[int, tuple[list[str], int]]) -> Mapping[str, float]:
    figures = {}
    for batch, (prompts, new) in batches.items():
        start = time.perf_counter()
        generate(prompts, 1)
        first = time.perf_counter() - start
        generate(prompts, new)
        seconds = time.perf_counter() - start - first
        figures |= {f"{batch} at once, tokens/s": batch * new / seconds, f"{batch}, first token ms": 1000 * first}
    return figures


def main() -> None:
    parser = options(__doc__, "generate", rounds=5)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(attn_implementation="sdpa")).eval().to(given.device)
    folder = Path(tempfile.mkdtemp())
    train([], 257, folder)  # a token is a byte
    tokenizer = AutoTokenizer.from_pretrained(folder)
    writer = Writer(copy.deepcopy(model), tokenizer)
    writer.end_of_text = -1  # no text ends early
    # at 32 rows a token takes ten times as long
    lengths = {1: given.new_tokens, 32: max(4, given.new_tokens // 4)}
    letters = {batch: torch.randint(97, 123, (batch, PROMPT_TOKENS)).tolist() for batch in lengths}
    batches = {batch: (["".join(map(chr, row)) for row in rows], lengths[batch]) for batch, rows in letters.items()}
    calls: dict[str, Generate] = {"model.generate": partial(theirs, model, tokenizer), "wikift": partial(ours, writer)}
    differ = 0
    for prompts, new in batches.values():  # the round that warms all up
        one, other = ([row[: PROMPT_TOKENS + new - 1] for row in call(prompts, new)] for call in calls.values())
        differ += sum(a != b for a, b in zip(one, other, strict=True))
    figures = interleave({name: partial(turn, call, batches) for name, call in calls.items()}, given.rounds)
    settings = {"device": given.device, "new tokens": list(lengths.values()), "threads": torch.get_num_threads()}
    lines = table(figures, "model.generate", *(f"{batch} at once, tokens/s" for batch in batches))
    lines += ["", f"Rows whose tokens differ: {differ}."]
    write(given, "Generation", figures, lines, about=machine("transformers"), **settings)


if __name__ == "__main__":
    main()
