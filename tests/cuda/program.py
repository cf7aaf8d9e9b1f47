"""launch/train.py on a pretended GPU, in a process of its own: what each step asked of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cuda.pretended import pretended
from tests.cuda.seen import Part, Seen
from tests.tiny import arguments


@dataclass(frozen=True)
class Marked:
    """An engine each of whose calls begins a new part of `seen`; what the loop does then is of the same part."""

    engine: Any
    seen: Seen

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.seen.begin("forward_backward, last" if kwargs.get("last") else name)
            return getattr(self.engine, name)(*args, **kwargs)

        return call


def train(ranks: int, lines: Sequence[Sequence[str]]) -> list[list[Part]]:
    """The parts of each of the command `lines`, trained one after another as rank 0 of `ranks`.

    Checkpoints of several ranks are written as far as this one goes, and not published.
    """
    from wikift.checkpoint.writer import Saver
    from wikift.commands.main import main
    from wikift.training import run, training

    training.SAMPLING = dataclasses.replace(training.SAMPLING, max_new_tokens=2)  # each is the same once more
    # by AdamW's count, a number of the device's, which is 0
    training.Training.skipped = property(lambda self: 0)  # type: ignore[method-assign, assignment]
    build = run.build_engine
    runs = []
    with pretended(ranks=ranks) as seen:

        def build_marked(*args: Any) -> Any:
            engine, *more = build(*args)
            return Marked(engine, seen), *more

        run.build_engine = build_marked
        if ranks > 1:
            Saver._all_written = lambda *_: False  # type: ignore[method-assign]
        for line in lines:
            seen.parts = [Part("start")]
            assert main(["train", *line]) == 0
            runs.append(seen.parts)
    return runs


def steps(parts: Sequence[Part]) -> list[list[Part]]:
    """The parts of each step: its micro-batches, then its update with what the loop does before the next step."""
    found: list[list[Part]] = []
    for part in parts:
        before = found[-1][-1].name if found else "step"
        if part.name.startswith("forward_backward") and not before.startswith("forward_backward"):
            found.append([])
        if found:
            found[-1].append(part)
    return found


def line(kind: str, store: Path, run: Path, **settings: Any) -> list[str]:
    """A command line that trains two layers of gpt2's width by `kind` on CUDA."""
    placed = {"deepspeed": kind} if kind.startswith("zero") else {"engine": kind.split()[0]}
    more = {"no_fsdp_reshard": True} if kind == "fsdp whole" else {}
    shape = "n_layer=2,n_head=12,n_embd=768,n_positions=1024"
    words: dict[str, Any] = {"config_overrides": shape, "block_size": 1024, "device": "cuda", "precision": "auto"}
    return arguments(store, run, **{**words, **placed, **more, **settings})
