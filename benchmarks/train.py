"""Training steps of wikift and of its peers, in turns, each in a process that lives through all rounds.

    python -m benchmarks.train                               # the peers, and wikift in one process
    python -m benchmarks.train --name train-engines --only "wikift$|1 process"    # wikift's engines on one process
    python -m benchmarks.train --name train-ranks --only "wikift$|2 ranks"        # each with half the blocks, threads
    python -m benchmarks.train --layers 12 --width 768 --heads 12 --block 1024 --micro-batch 16 --steps 20   # on a GPU

Same weights, random tokens, global batch, precision, dropout, AdamW and clipping; that they learn the same is shown by
benchmarks/parity.py. The figures: tokens per second, processor seconds of a step, the most memory the process ever held
(on a CPU its start and its compilation included), and the seconds to the end of the first step: imports but torch's,
building and compilation, with caches as they are. All of it runs on a GPU where there is one, in bf16 where that is
native. All processes hold their memory through all rounds: --only where they do not fit.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Process, cores, interleave, machine, options, table, write
from wikift.model.gpt2 import model_config, resolve_precision
from wikift.training.meter import memory_gb

BEGUN = time.perf_counter()
LR, DECAY = 1e-4, 0.1
PEERS = r"^(?!.*(1 process|2 ranks))"
ENGINES = ("ddp", "fsdp", "zero1", "zero2", "zero3")


# The same for every contestant, by the options' names. `micro_batch` is a process', a step's tokens are those of all.
Setting = Namespace
SHAPE = ("layers", "width", "heads", "block", "micro_batch", "accumulation", "vocabulary")
SETTINGS = (*SHAPE, "dropout", "precision", "threads", "device")


def micro_batches(setting: Setting, rank: int = 0, ranks: int = 1) -> Iterator[Tensor]:
    """Blocks (micro_batch, block + 1) of this rank: of each `ranks` times as many in turn, its share.

    On a GPU they come from pinned memory, copied without waiting, as every contestant's own loader does it.
    """
    random = torch.Generator().manual_seed(0)
    while True:
        rows = torch.randint(setting.vocabulary, (setting.micro_batch * ranks, setting.block + 1), generator=random)
        rows = rows[rank * setting.micro_batch :][: setting.micro_batch]
        yield rows if setting.device == "cpu" else rows.pin_memory().to(setting.device, non_blocking=True)


def hf_model(setting: Setting) -> Any:
    from transformers import GPT2LMHeadModel

    shape = {"n_layer": setting.layers, "n_head": setting.heads, "n_embd": setting.width, "n_positions": setting.block}
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), setting.dropout)
    ends = {"vocab_size": setting.vocabulary, "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    return GPT2LMHeadModel(model_config({**shape, **rates, **ends})).train().to(setting.device)


def finished(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def turns(setting: Setting, ranks: int = 1, rank: int = 0) -> Iterator[None]:
    """Yields wherever the contestant is to make a step: two first, then as many as each line of standard input says.

    Says `{"first_step_s": ...}` when it is at rest, and then of each turn what it took. On a GPU a turn begins with a
    step that does not count and ends with the cached memory given back, for the others.
    """
    yield
    finished(setting.device)
    first = time.perf_counter() - BEGUN
    yield
    finished(setting.device)
    answer = {"first_step_s": first}
    while True:
        if rank == 0:
            print(json.dumps(answer), flush=True)
        steps = torch.tensor(int(sys.stdin.readline() or 0) if rank == 0 else 0)
        if ranks > 1:
            torch.distributed.broadcast(steps, 0)
        if not steps:
            return
        if setting.device == "cuda":
            yield
            finished(setting.device)
        start, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        for _ in range(int(steps)):
            yield
        finished(setting.device)
        seconds, now = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
        cpu = now.ru_utime - used.ru_utime + now.ru_stime - used.ru_stime
        answer = {"step_s": seconds / int(steps), "cpu_s": cpu / int(steps)}
        answer["peak_gb"] = memory_gb(torch.device(setting.device))
        if setting.device == "cuda":
            torch.cuda.empty_cache()


def plain_loop(setting: Setting, *, compile: bool) -> None:
    """transformers' model, autocast, AdamW, clipping."""
    model = hf_model(setting)
    run: Any = torch.compile(model) if compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY, fused=True)
    blocks = micro_batches(setting)
    for _ in turns(setting):
        for _ in range(setting.accumulation):
            ids = next(blocks)[:, :-1]
            with torch.autocast(setting.device, torch.bfloat16, enabled=setting.precision == "bf16"):
                loss = run(input_ids=ids, labels=ids, use_cache=False).loss / setting.accumulation
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def trainer(setting: Setting, *, compile: bool) -> None:
    """transformers' Trainer in its own loop; the labels are the ids, as run_clm has them."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    blocks, steps = micro_batches(setting), turns(setting)
    count = max(setting.accumulation, 4096 // setting.micro_batch)
    rows = [row for _ in range(count) for row in next(blocks)[:, :-1].cpu()]

    class Turns(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if next(steps, self) is self:
                os._exit(0)

    arguments = TrainingArguments(
        tempfile.mkdtemp(), use_cpu=setting.device == "cpu", bf16=setting.precision == "bf16",
        torch_compile=compile, report_to="none", per_device_train_batch_size=setting.micro_batch,
        gradient_accumulation_steps=setting.accumulation, max_steps=100_000, save_strategy="no", learning_rate=LR,
        weight_decay=DECAY, disable_tqdm=True,
    )  # fmt: skip
    items: Any = [{"input_ids": row, "labels": row} for row in rows]
    Trainer(hf_model(setting), arguments, train_dataset=items, callbacks=[Turns()]).train()


def wikift(setting: Setting, *, kind: str, compile: bool = False) -> None:
    """An engine of wikift's, on as many processes as torchrun started."""
    from tests.tiny_engines import make_engine
    from wikift.base.work import AdamSettings
    from wikift.base.world import join_group, start_world
    from wikift.checkpoint.fragment import FreshStart
    from wikift.engines.memory import keep_freed_memory

    keep_freed_memory()  # as launch/train.py does
    world = start_world(setting.device)
    if kind != "single":
        join_group(world)
    model = hf_model(setting)
    engine = make_engine(
        kind, world, model.config, micro=setting.micro_batch, accumulation=setting.accumulation,
        precision=setting.precision, adam=AdamSettings(DECAY, 0.9, 0.999, 1e-8, 1.0), compile=compile,
    )  # fmt: skip
    weights = {name: tensor.detach().flatten().cpu() for name, tensor in model.named_parameters()}
    engine.restore(FreshStart(lambda name, start, stop: weights[name][start:stop]))
    weights.clear()
    del model
    blocks = micro_batches(setting, world.rank, world.size)
    for _ in turns(setting, world.size, world.rank):
        for number in range(setting.accumulation):
            engine.forward_backward(next(blocks), last=number == setting.accumulation - 1)
        engine.step(LR)
    if world.size > 1:
        torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads would end the process by SIGABRT


CONTESTANTS: dict[str, Callable[[Setting], None]] = {
    "Trainer": partial(trainer, compile=False),
    "Trainer, compiled": partial(trainer, compile=True),
    "plain loop": partial(plain_loop, compile=False),
    "plain loop, compiled": partial(plain_loop, compile=True),
    "wikift": partial(wikift, kind="single"),
    "wikift, compiled": partial(wikift, kind="single", compile=True),
    **{f"wikift {kind}, 1 process": partial(wikift, kind=kind) for kind in ENGINES},
    **{f"wikift {kind}, 2 ranks": partial(wikift, kind=kind) for kind in ENGINES},
}


def start(name: str, setting: Setting, ranks: int) -> Process:
    """The contestant past its first step. Two ranks share the blocks and the threads of one process."""
    share = {"micro_batch": setting.micro_batch // ranks, "threads": max(1, setting.threads // ranks)}
    asked = json.dumps(vars(setting) | share)
    process = Process("benchmarks.train", "--contestant", name, asked, ranks=ranks)
    print(f"{name}: {process.first}", file=sys.stderr, flush=True)
    return process


def turn(process: Process, tokens: int, ranks: int, steps: int) -> Mapping[str, float]:
    found = process.ask(steps)
    both = {"processor s a step": found["cpu_s"] * ranks, "peak GB": found["peak_gb"] * ranks}
    return {"tokens/s": tokens / found["step_s"], **both}


def main() -> None:
    """Run the contest."""
    parser = options(__doc__, "train", rounds=7, shape=(6, 384, 6))
    parser.add_argument("--steps", type=int, default=4, help="of one turn")
    parser.add_argument("--only", default=PEERS, help="which contestants take part: a pattern of their names")
    for name, default in (("block", 256), ("micro-batch", 4), ("accumulation", 1), ("vocabulary", 50257)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="default what the device does natively")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    native = resolve_precision("auto", torch.device(given.device)).name
    given.precision = given.precision or ("bf16" if native == "bf16" else "fp32")
    setting = Setting(**{name: getattr(given, name) for name in SETTINGS})
    ranks = {name: 2 if "2 ranks" in name else 1 for name in CONTESTANTS}
    names = [name for name in CONTESTANTS if re.search(given.only, name)]
    with contextlib.ExitStack() as stack:
        processes = {name: stack.enter_context(start(name, setting, ranks[name])) for name in names}
        tokens = setting.block * setting.micro_batch * setting.accumulation
        contest = {name: partial(turn, one, tokens, ranks[name], given.steps) for name, one in processes.items()}
        figures = interleave(contest, given.rounds, uncounted=1)
        for name, process in processes.items():
            figures[name]["first step s"] = [process.first["first_step_s"]]
    against = next(name for name in ("Trainer", "wikift", *names) if name in figures)
    lines = table(figures, against, "tokens/s", "processor s a step")
    settings = {**vars(setting), "steps of a turn": given.steps}
    write(given, "Training steps", figures, lines, about=machine("transformers", "deepspeed"), **settings)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--contestant"]:
        chosen = Setting(**json.loads(sys.argv[3]))
        if "RANK" not in os.environ:
            os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # the Trainer would take all there are
        torch.set_num_threads(chosen.threads)
        CONTESTANTS[sys.argv[2]](chosen)
    else:
        main()
