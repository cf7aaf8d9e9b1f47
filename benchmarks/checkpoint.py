"""A checkpoint of weights and optimizer while training goes on: how long it stands still, how long until it is durable.

    python -m benchmarks.checkpoint [--rounds 5] [--layers 12 --width 768 --heads 12]      # a GPT-2 of 124M by default

Contestants: wikift's saver, and torch's DCP, `async_save` of `get_state_dict`. (The Trainer's checkpoints stop the
training until all is written: its stall is the time to be durable.) Each lives in a process of its own and trains the
same model in fp32. A turn is some steps, a save, and steps until it is written:

    stall    from the call until the next step may begin
    lost     that, and by how much the steps beside the writing were slower than those before
    durable  from the call until the files are written (seen after a step), and on the disk: what a library does not
             flush itself is flushed here (fsync of every file), and counted

The first save of a process, for which buffers are made, does not count.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Process, interleave, machine, options, table, write
from wikift.model.gpt2 import make_model, model_config, parameter_shapes

BLOCK = 64  # tokens of a step: a second or less
Step = Callable[[], object]
Save = Callable[[Path], Callable[[], bool]]  # returns when training may go on, with what says whether it is written


def dcp(config: Any) -> tuple[Step, Save]:
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(config.vocab_size, (1, BLOCK))
    stager = DefaultStager(StagingOptions(False, False, False, False))  # keeps its buffers; async_save's own does not

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def save(folder: Path) -> Callable[[], bool]:
        weights, state = get_state_dict(model, optimizer)
        made = {"model": weights, "optim": state}
        writing: Any = checkpoint.async_save(made, checkpoint_id=folder, async_stager=stager)
        return lambda: writing.done()

    return step, save


def wikift(config: Any) -> tuple[Step, Save]:
    from tests.tiny_engines import make_engine, random_start
    from wikift.base.world import start_world
    from wikift.checkpoint.writer import Saver

    world = start_world("cpu")
    engine = make_engine("single", world, config)
    engine.restore(random_start(config))
    with torch.device("meta"):
        shapes = {name: list(shape) for name, shape in parameter_shapes(make_model(config)).items()}
    ids = torch.randint(config.vocab_size, (1, BLOCK + 1))
    saver = Saver(Path(), world, keep=1, aside=True)

    def step() -> None:
        engine.forward_backward(ids, last=True)
        engine.step(1e-4)

    def save(folder: Path) -> Callable[[], bool]:
        saver.run = folder
        saver.save(engine.fragments(), 1, {"tokens": BLOCK, "model_config": config.to_dict()}, shapes)
        return lambda: bool(saver.fault) or saver.take_saved() is not None

    return step, save


CONTESTANTS = {"DCP async_save": dcp, "wikift": wikift}


def turn(step: Step, save: Save, folder: Path) -> Mapping[str, float]:
    shutil.rmtree(folder, ignore_errors=True)
    os.sync()
    usual = statistics.median(_seconds(step) for _ in range(3))
    begun = time.perf_counter()
    written = save(folder)
    lost = stall = time.perf_counter() - begun
    while not written():
        lost += max(0.0, _seconds(step) - usual)
    for path in folder.rglob("*.*"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    return {"stall s": stall, "lost s": lost, "durable s": time.perf_counter() - begun, "step s": usual}


def _seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def serve(name: str, shape: dict[str, int], folder: Path) -> None:
    """A save with buffers yet to be made, then one for each line of standard input."""
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    torch.manual_seed(0)
    step, save = CONTESTANTS[name](model_config({**shape, **rates, "bos_token_id": 0, "eos_token_id": 0}))
    step()
    for _ in itertools.chain(["first"], sys.stdin):
        print(json.dumps(turn(step, save, folder)), flush=True)
    os._exit(0)  # gloo's threads would end the process by SIGABRT


def main() -> None:
    """Run the contest."""
    parser = options(__doc__, "checkpoint", rounds=5, shape=(12, 768, 12))
    parser.add_argument("--folder", type=Path, help="on which disk; default a temporary folder's")
    given = parser.parse_args()
    shape = {"n_layer": given.layers, "n_embd": given.width, "n_head": given.heads, "vocab_size": 50257}
    with tempfile.TemporaryDirectory(dir=given.folder) as work, contextlib.ExitStack() as stack:
        contest = {}
        for name in CONTESTANTS:
            asked = ("--contestant", name, json.dumps(shape), f"{work}/{name}")
            contest[name] = partial(stack.enter_context(Process("benchmarks.checkpoint", *asked)).ask, "save")
        figures = interleave(contest, given.rounds)
    about = machine("transformers")
    write(given, "Checkpoints", figures, table(figures, "DCP async_save", "stall s"), about=about, **shape)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--contestant"]:
        serve(sys.argv[2], json.loads(sys.argv[3]), Path(sys.argv[4]))
    main()
