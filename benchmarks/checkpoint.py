"""A checkpoint of weights and optimizer while training goes on: how long it stands still, how long until it is durable.

    python -m benchmarks.checkpoint [--rounds 5] [--layers 12 --width 768 --heads 12]      # a GPT-2 of 124M by default

Contestants: wikift's saver; transformers' `Trainer.save_model` and its optimizer by `torch.save`, as its checkpoints
have them; torch's DCP, `async_save` of `get_state_dict`; DeepSpeed's `save_checkpoint`. Each lives in a process of its
own and trains the same model in fp32. A turn is some steps, a save, and steps until it is written:

    stall    from the call until the next step may begin
    lost     that, and by how much the steps beside the writing were slower than those before
    durable  from the call until the files are written, and on the disk: what a library does not flush itself is flushed
             here (fsync of every file), and counted

The first save of a process, for which buffers are made, is its own figure. All hold their memory through all rounds:
3 GB each at 124M.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import Process, interleave, machine, options, table, write

STEPS_BEFORE = 3
BLOCK = 64  # tokens of a step: a second or less


class Contestant(NamedTuple):
    """`step()` trains; `save(folder)` returns when training may go on, with the function that awaits the writing.

    That gives the moment (perf_counter) at which it was through, or None while it is not, unless told to wait.
    """

    step: Callable[[], object]
    save: Callable[[Path], Callable[[bool], float | None]]


def plain(config: Any) -> tuple[Any, Any, Callable[[], object]]:
    """A model, its AdamW, and a step of theirs."""
    import torch
    from transformers import GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(config.vocab_size, (1, BLOCK))

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return model, optimizer, step


def trainer(config: Any) -> Contestant:
    import torch
    from transformers import Trainer, TrainingArguments

    model, optimizer, step = plain(config)
    made = Trainer(model, TrainingArguments(tempfile.mkdtemp(), use_cpu=True, report_to="none"))

    def save(folder: Path) -> Callable[[bool], float | None]:
        made.save_model(str(folder))
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        return _through()

    return Contestant(step, save)


def dcp(config: Any) -> Contestant:
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model, optimizer, step = plain(config)
    stager = DefaultStager(StagingOptions(False, False, False, False))  # keeps its buffers; async_save's own does not

    def save(folder: Path) -> Callable[[bool], float | None]:
        weights, state = get_state_dict(model, optimizer)
        writing: Any = checkpoint.async_save(
            {"model": weights, "optim": state}, checkpoint_id=folder, async_stager=stager
        )
        through: list[float] = []
        writing.add_done_callback(lambda _: through.append(time.perf_counter()))

        def done(wait: bool) -> float | None:
            if wait:
                writing.result()
            return through[0] if through else None

        return done

    return Contestant(step, save)


def deepspeed(config: Any) -> Contestant:
    import torch
    from transformers import GPT2LMHeadModel

    with contextlib.redirect_stdout(sys.stderr):
        import deepspeed
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).train()
    os.environ.setdefault("LOCAL_RANK", "0")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    asked = {"train_batch_size": 1, "zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    with contextlib.redirect_stdout(sys.stderr):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=asked)
    ids = torch.randint(config.vocab_size, (1, BLOCK))

    def step() -> None:
        engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
        engine.step()

    def save(folder: Path) -> Callable[[bool], float | None]:
        with contextlib.redirect_stdout(sys.stderr):
            engine.save_checkpoint(str(folder))
        return _through()

    return Contestant(step, save)


def wikift(config: Any) -> Contestant:
    import torch

    from tests.tiny_engines import make_engine, random_start
    from wikift.base.world import start_world
    from wikift.checkpoint.writer import Saver
    from wikift.model.gpt2 import make_model, parameter_shapes

    world = start_world("cpu")
    engine = make_engine("single", world, config)
    engine.restore(random_start(config))
    with torch.device("meta"):
        shapes = {name: list(shape) for name, shape in parameter_shapes(make_model(config)).items()}
    ids = torch.randint(config.vocab_size, (1, BLOCK + 1))
    savers: list[Saver] = []

    def step() -> None:
        engine.forward_backward(ids, last=True)
        engine.step(1e-4)

    def save(folder: Path) -> Callable[[bool], float | None]:
        if not savers:
            savers.append(Saver(folder, world, keep=1, aside=True))
        (saver,) = savers
        saver.run = folder
        begun = time.perf_counter()
        saver.save(engine.fragments(), 1, {"tokens": BLOCK, "model_config": config.to_dict()}, shapes)

        def done(wait: bool) -> float | None:
            if wait:
                saver.finish()
            saved = saver.take_saved()
            return None if saved is None else begun + saved.seconds

        return done

    return Contestant(step, save)


def _through() -> Callable[[bool], float | None]:
    at = time.perf_counter()
    return lambda wait: at


CONTESTANTS: dict[str, Callable[[Any], Contestant]] = {
    "Trainer": trainer, "DCP async_save": dcp, "DeepSpeed": deepspeed, "wikift": wikift,
}  # fmt: skip


def serve(name: str, shape: dict[str, int], folder: Path) -> None:
    """A save with buffers yet to be made, then one for each line of standard input."""
    import json

    from wikift.model.gpt2 import model_config

    config = model_config({**shape, "bos_token_id": 0, "eos_token_id": 0, **dict.fromkeys(_RATES, 0.0)})
    one = CONTESTANTS[name](config)
    one.step()
    first = turn(one, folder)
    print(json.dumps({"first stall s": first["stall s"]}), flush=True)
    while sys.stdin.readline():
        print(json.dumps(turn(one, folder)), flush=True)
    os._exit(0)  # gloo's threads would end the process by SIGABRT


_RATES = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


def turn(one: Contestant, folder: Path) -> Mapping[str, float]:
    shutil.rmtree(folder, ignore_errors=True)
    os.sync()
    usual = statistics.median(_seconds(one.step) for _ in range(STEPS_BEFORE))
    begun = time.perf_counter()
    done = one.save(folder)
    stall = time.perf_counter() - begun
    slowed, through = 0.0, done(False)
    while through is None:
        slowed += max(0.0, _seconds(one.step) - usual)
        through = done(False)
    flush = time.perf_counter()
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    flush = time.perf_counter() - flush
    return {
        "stall s": stall, "lost s": stall + slowed, "durable s": through - begun + flush,
        "size MB": sum(path.stat().st_size for path in files) / 1e6, "step s": usual,
    }  # fmt: skip


def _seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def main() -> None:
    """Run the contest."""
    import json

    if sys.argv[1:2] == ["--contestant"]:
        serve(sys.argv[2], json.loads(sys.argv[3]), Path(sys.argv[4]))
    parser = options(__doc__, "checkpoint", rounds=5)
    parser.add_argument("--folder", type=Path, help="on which disk; default a temporary folder's")
    for name, default in (("layers", 12), ("width", 768), ("heads", 12), ("vocabulary", 50257)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    shape = {"n_layer": given.layers, "n_embd": given.width, "n_head": given.heads, "vocab_size": given.vocabulary}
    with tempfile.TemporaryDirectory(dir=given.folder) as work, contextlib.ExitStack() as stack:
        asked = json.dumps(shape)
        processes = {
            name: stack.enter_context(Process("benchmarks.checkpoint", "--contestant", name, asked, f"{work}/{number}"))
            for number, name in enumerate(CONTESTANTS)
        }
        figures = interleave({name: partial(p.ask, "save") for name, p in processes.items()}, given.rounds)
        for name, process in processes.items():
            figures[name]["first stall s"] = [process.first["first stall s"]]
    write(
        given.name, "Checkpoints", [*table(figures, against="Trainer", figure="stall s")], figures,
        settings={**shape, "precision": "fp32", "tokens of a step": BLOCK}, folder=given.results,
        about=machine("transformers", "deepspeed"), against=dict.fromkeys(figures, "Trainer"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
