"""A store and a model small enough that a whole training run takes a second."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from wikift.base.errors import EnvironmentFault, UserError
from wikift.data.store import Encoded, write_store

VOCABULARY = 97
SHAPE = "n_layer=2,n_head=2,n_embd=32,n_positions=16"


def tiny_store(
    folder: Path, *, train: int = 409, validation: int = 61, seed: int = 0, vocabulary: int = VOCABULARY
) -> Path:
    """A published store of random ids with a pattern to learn: 51 blocks of 8 tokens by default."""
    random = np.random.default_rng(seed)

    def part(tokens: int) -> list[Encoded]:
        ids = (np.arange(tokens) * 7 + random.integers(0, 5, tokens)) % vocabulary
        return [Encoded(ids.astype(np.uint16), rows=1, words=max(1, tokens // 2), bytes=tokens * 3)]

    splits = {"train": part(train), **({"validation": part(validation)} if validation else {})}
    write_store(folder, splits, vocab_size=vocabulary, eos_token_id=0, tokenizer_fingerprint=f"tiny-{vocabulary}")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    return folder


def arguments(store: Path, run: Path, **settings: Any) -> list[str]:
    """A command line of wikift train: 12 steps of 8 blocks from scratch, dropout on, an epoch in 6.4 steps."""
    words: dict[str, Any] = {
        "data": store, "output_dir": run, "from_scratch": True, "config_overrides": SHAPE, "block_size": 8,
        "global_batch_size": 8, "max_steps": 12, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 4,
        "eval_steps": 4, "precision": "fp32", "device": "cpu", "quiet": True, **settings,
    }  # fmt: skip
    line = []
    for name, value in words.items():
        if value is True:
            line.append(f"--{name}")
        elif value is not None and value is not False:
            line += [f"--{name}", str(value)]
    return line


def train(command_line: list[str]) -> int:
    """wikift train, imported where it runs: in a rank."""
    from wikift.commands.train import main

    return main(command_line)


def problems_of_training(command_line: list[str]) -> list[str]:
    """The problems of a command line that is refused; of a fault of the environment "fault" and its message."""
    try:
        train(command_line)
    except UserError as error:
        return list(error.problems)
    except EnvironmentFault as fault:
        return ["fault", str(fault)]
    return []


def until(true: Callable[[], object], *processes: Any, seconds: float = 180, shown: Callable[[], str] = str) -> None:
    """Wait for what is to become true. Fails after `seconds`, and where one of `processes` has ended, with `shown`."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline or any(process.poll() is not None for process in processes):
            for process in processes:
                process.kill()
            raise AssertionError(shown())
        time.sleep(0.02)


def logged(run: Path) -> int:
    """How many lines metrics.jsonl has."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def metrics(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, every line of it valid."""
    return [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]


def curve(run: Path) -> list[tuple[Any, ...]]:
    """What must be the same in two runs of one experiment, to the last bit, a tuple a step."""
    names = ("step", "loss", "grad_norm", "learning_rate", "tokens", "eval_loss")
    return [tuple(values.get(name) for name in names) for values in metrics(run) if "event" not in values]
