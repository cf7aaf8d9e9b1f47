"""Tokens per second of transformers' `generate`, with and without a static compiled cache, and of wikift: greedy, fp32.

    python -m benchmarks.generate [--new-tokens 64] [--rounds 5] [--no-compiled]

A GPT-2 of 124M random weights continues prompts of 32 tokens, one at once
and 32 at once, on a GPU where there is one (--device); all must write the same tokens. The first token's time is that
of reading the prompt and choosing one token, with all that a call does besides.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, CompileConfig, GenerationConfig, GPT2Config, GPT2LMHeadModel

from benchmarks.harness import Contestant, Figures, interleave, machine, options, table, write
from wikift.data.tokenizer import train
from wikift.generation.sampler import Sampling
from wikift.generation.writer import Writer

PROMPT_TOKENS = 32
Written = list[list[int]]


def main() -> None:
    parser = options(__doc__, "generate", rounds=5)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=True)
    given = parser.parse_args()
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(attn_implementation="sdpa")).eval().to(given.device)
    folder = Path(tempfile.mkdtemp())
    train([], 257, folder)  # a token is a byte
    tokenizer = AutoTokenizer.from_pretrained(folder)
    writer = Writer(copy.deepcopy(model), tokenizer)
    writer.end_of_text = -1  # no text ends early
    lines: list[str] = []
    figures: Figures = {}
    against: dict[str, str] = {}
    for batch in given.batches:
        # at 32 rows a token takes ten times as long
        new = given.new_tokens if batch == 1 else max(8, given.new_tokens // 4)
        calls = _calls(model, tokenizer, writer, batch, compiled=given.compiled)
        same = _same_tokens(calls, new)
        found = interleave({name: _timed(call, batch, new) for name, call in calls.items()}, given.rounds)
        lines += [f"## {batch} at once, {new} new tokens", ""]
        lines += [*table(found, against="model.generate", figure="tokens/s"), "", f"Same tokens: {same}.", ""]
        figures.update({f"{name}, {batch} at once": values for name, values in found.items()})
        against.update({f"{name}, {batch} at once": f"model.generate, {batch} at once" for name in found})
    settings = {
        "device": given.device,
        "model": "GPT-2 124M, random weights",
        "prompt tokens": PROMPT_TOKENS,
        "precision": "fp32",
        "greedy": True,
    }
    write(
        given.name, "Generation", lines, figures, settings={**settings, "threads": torch.get_num_threads()},
        about=machine("transformers"), folder=given.results, against=against,
    )  # fmt: skip


def _calls(
    model: GPT2LMHeadModel, tokenizer: Any, writer: Writer, batch: int, *, compiled: bool
) -> dict[str, Callable[[int], Written]]:
    """Each contestant as a function of the number of new tokens that gives all rows' tokens."""
    random = torch.Generator().manual_seed(batch)
    ids = torch.randint(97, 123, (batch, PROMPT_TOKENS), generator=random)
    prompts = ["".join(map(chr, row)) for row in ids.tolist()]
    ids = torch.tensor(tokenizer(prompts)["input_ids"], device=model.device)

    def theirs(new: int, **words: Any) -> Written:
        config = GenerationConfig(
            max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=None, **words
        )
        with torch.inference_mode():
            found = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        return found.tolist()  # type: ignore[no-any-return]

    def ours(new: int) -> Written:
        writer.answers(list(enumerate(prompts)), Sampling(temperature=0, max_new_tokens=new))
        return [list(window) for window in writer.decoder.windows]  # all but the last token, which nothing follows

    calls: dict[str, Callable[[int], Written]] = {"model.generate": theirs}
    if compiled:
        compiling = CompileConfig()
        compiling._compile_all_devices = True  # transformers leaves it out on a CPU
        calls["static compiled"] = lambda new: theirs(new, cache_implementation="static", compile_config=compiling)
    return calls | {"wikift": ours}


def _same_tokens(calls: Mapping[str, Callable[[int], Written]], new: int) -> str:
    """Says who writes other tokens than the first; also the round that warms all of them up."""
    written = {name: [row[: PROMPT_TOKENS + new - 1] for row in call(new)] for name, call in calls.items()}
    first = next(iter(written.values()))
    others = {name: sum(a != b for a, b in zip(rows, first, strict=True)) for name, rows in written.items()}
    return (
        "yes" if not any(others.values()) else ", ".join(f"{name} {n} rows differ" for name, n in others.items() if n)
    )


def _timed(call: Callable[[int], Written], batch: int, new: int) -> Contestant:
    def run() -> dict[str, float]:
        start = time.perf_counter()
        call(1)
        first = time.perf_counter() - start
        start = time.perf_counter()
        call(new)
        seconds = time.perf_counter() - start
        return {"tokens/s": batch * new / seconds, "first token ms": 1000 * first}

    return run


if __name__ == "__main__":
    main()
