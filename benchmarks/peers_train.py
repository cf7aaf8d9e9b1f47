"""One contestant of benchmarks/train.py in a process of its own: `python -m benchmarks.peers_train NAME SETTING`.

It trains on random tokens, says `{"first_step_s": ...}` (imports but torch's, building and compilation included) when
its second step is through and it is at rest, and then makes as many steps as each line of its standard input says,
answering with JSON. On a GPU each turn begins with a step that does not count and ends with its cached memory given
back, for the others. nanoGPT's and LitGPT's methods are rebuilt from their published design: one compiled model, logits
in one piece, autocast, AdamW, clipping. nanoGPT fuses AdamW on a GPU only, LitGPT always, and it pads the vocabulary to
a multiple of 512. All start from the same weights.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from wikift.training.meter import memory_gb

BEGUN = time.perf_counter()
LR, DECAY = 1e-4, 0.1
CHECKED_STEPS = 3
PRODUCTS = "the products alone"


@dataclass(frozen=True)
class Setting:
    """The same for every contestant. `micro_batch` is a process', a step's tokens are those of all of them."""

    layers: int
    width: int
    heads: int
    block: int  # tokens
    micro_batch: int  # blocks
    accumulation: int
    vocabulary: int
    dropout: float
    precision: str
    threads: int
    device: str = "cpu"
    check: bool = False  # no dropout, the same blocks in every step, and the losses are asked for

    def rates(self) -> dict[str, float]:
        return dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0 if self.check else self.dropout)

    def micro_batches(self, rank: int = 0, ranks: int = 1) -> Iterator[Tensor]:
        """Blocks (micro_batch, block + 1) of this rank: of each `ranks` times as many in turn, its share.

        On a GPU they come from pinned memory, copied without waiting, as every contestant's own loader does it.
        """
        while True:
            random = torch.Generator().manual_seed(0)
            for _ in range(self.accumulation if self.check else 1_000_000):
                rows = torch.randint(self.vocabulary, (self.micro_batch * ranks, self.block + 1), generator=random)
                rows = rows[rank * self.micro_batch :][: self.micro_batch]
                yield rows if self.device == "cpu" else rows.pin_memory().to(self.device, non_blocking=True)

    def autocast(self) -> Any:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16")

    def hf_config(self) -> Any:
        from wikift.model.gpt2 import model_config

        shape = {"n_layer": self.layers, "n_head": self.heads, "n_embd": self.width, "n_positions": self.block}
        return model_config(
            {**shape, **self.rates(), "vocab_size": self.vocabulary, "bos_token_id": 0, "eos_token_id": 0}
        )

    def hf_model(self) -> Any:
        from transformers import GPT2LMHeadModel

        torch.manual_seed(0)
        return GPT2LMHeadModel(self.hf_config()).train().to(self.device)


Step = Callable[[], Tensor]  # one optimizer step; the mean loss of its blocks


def serve(setting: Setting, step: Step, ranks: int = 1, rank: int = 0) -> None:
    """The first step, then turns of as many as are asked for; or the losses of the first steps."""
    answer = (lambda found: print(json.dumps(found), flush=True)) if rank == 0 else (lambda found: None)
    if setting.check:
        return answer({"losses": [_mean(step(), ranks) for _ in range(CHECKED_STEPS)]})
    step()
    finished(setting.device)
    first = time.perf_counter() - BEGUN
    step()
    finished(setting.device)
    answer({"first_step_s": first})
    while steps := _asked(ranks, rank):
        if setting.device != "cpu":
            step()
            finished(setting.device)
        start, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        for _ in range(steps):
            step()
        finished(setting.device)
        seconds, now = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
        cpu = now.ru_utime - used.ru_utime + now.ru_stime - used.ru_stime
        answer({"step_s": seconds / steps, "cpu_s": cpu / steps, "peak_gb": memory_gb(torch.device(setting.device))})
        if setting.device == "cuda":
            torch.cuda.empty_cache()
    return None


def finished(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def _asked(ranks: int, rank: int) -> int:
    steps = torch.tensor(int(sys.stdin.readline() or 0) if rank == 0 else 0)
    if ranks > 1:
        torch.distributed.broadcast(steps, 0)
    return int(steps)


def _mean(loss: Tensor, ranks: int) -> float:
    loss = loss.double()
    if ranks > 1:
        torch.distributed.all_reduce(loss)
    return float(loss) / ranks


def loop(setting: Setting, model: torch.nn.Module, loss_of: Callable[[Tensor], Tensor], fused: bool) -> Step:
    """The plain loop: autocast, AdamW, clipping."""
    fused = fused or setting.device == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY, fused=fused)
    blocks = setting.micro_batches()

    def step() -> Tensor:
        total = torch.zeros((), device=setting.device)
        for _ in range(setting.accumulation):
            with setting.autocast():
                loss = loss_of(next(blocks)) / setting.accumulation
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


def hand_written(setting: Setting, *, pad: int, fused: bool, compile: bool) -> None:
    from benchmarks.handwritten import GPT

    pad = 1 if setting.check else pad  # logits of words that are not there would be part of the loss
    model = GPT(setting.hf_config(), -(-setting.vocabulary // pad) * pad).to(setting.device)
    model.copy(setting.hf_model()).train()
    run: Any = torch.compile(model) if compile else model
    serve(setting, loop(setting, model, lambda b: run(b[:, :-1], b[:, 1:]), fused))


def hf_loop(setting: Setting, *, compile: bool) -> None:
    model = setting.hf_model()
    run: Any = torch.compile(model) if compile else model
    serve(
        setting, loop(setting, model, lambda b: run(input_ids=b[:, :-1], labels=b[:, :-1], use_cache=False).loss, True)
    )


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Blocks as run_clm gives them to the Trainer: the labels are the ids, so a block's last token is not predicted."""

    def __init__(self, setting: Setting) -> None:
        count = setting.accumulation if setting.check else max(setting.accumulation, 4096 // setting.micro_batch)
        blocks = setting.micro_batches()
        self.rows = torch.cat([next(blocks)[:, :-1].cpu() for _ in range(count)])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[place], "labels": self.rows[place]}


def trainer(setting: Setting, *, compile: bool) -> None:
    """transformers' Trainer in its own loop; after each step it waits in a callback until it is its turn."""
    import tempfile
    import threading

    from transformers import Trainer, TrainerCallback, TrainingArguments

    turn, done = threading.Semaphore(0), threading.Semaphore(0)
    losses: list[Tensor] = []

    class Turns(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            done.release()
            turn.acquire()

    class Watched(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            losses.append(super().training_step(*args, **kwargs))
            return losses[-1]

    arguments = TrainingArguments(
        tempfile.mkdtemp(), use_cpu=setting.device == "cpu", bf16=setting.precision == "bf16",
        torch_compile=compile, report_to="none", per_device_train_batch_size=setting.micro_batch,
        gradient_accumulation_steps=setting.accumulation, max_steps=100_000, save_strategy="no", learning_rate=LR,
        weight_decay=DECAY, disable_tqdm=True,
    )  # fmt: skip
    made = Watched(setting.hf_model(), arguments, train_dataset=Rows(setting), callbacks=[Turns()])
    started = False

    def step() -> Tensor:
        nonlocal started
        if started:
            turn.release()
        started = True
        done.acquire()
        # It divides by the count of all labels, though a block's first is nobody's target
        total = torch.stack(losses).sum() * setting.block / (setting.block - 1)
        losses.clear()
        return total

    def turns() -> None:  # beside the training, which stays in the main thread, as everybody's
        serve(setting, step)
        os._exit(0)

    threading.Thread(target=turns, daemon=True).start()
    made.train()


def deepspeed_loop(setting: Setting, *, own_adam: bool) -> None:
    """Stock DeepSpeed, ZeRO 1. Its own AdamW on a CPU is an extension that it compiles at the first use, 30 s."""
    with contextlib.redirect_stdout(sys.stderr):
        import deepspeed
    model = setting.hf_model()
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": setting.micro_batch, "gradient_accumulation_steps": setting.accumulation,
        "bf16": {"enabled": setting.precision == "bf16"}, "zero_optimization": {"stage": 1}, "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    given: dict[str, Any] = {"model_parameters": model.parameters()}
    if own_adam:
        config["optimizer"] = {"type": "AdamW", "params": {"lr": LR, "weight_decay": DECAY}}
    else:
        given = {"optimizer": torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY, fused=True)}
    store = torch.distributed.HashStore()
    backend = "gloo" if setting.device == "cpu" else "nccl"
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    os.environ.setdefault("LOCAL_RANK", "0")
    with contextlib.redirect_stdout(sys.stderr):
        engine, *_ = deepspeed.initialize(model=model, config=config, **given)
    blocks = setting.micro_batches()

    def step() -> Tensor:
        total = torch.zeros((), device=setting.device)
        for _ in range(setting.accumulation):
            block = next(blocks)[:, :-1]
            loss = engine(input_ids=block, labels=block, use_cache=False).loss
            engine.backward(loss)
            engine.step()
            total += loss.detach().float() / setting.accumulation
        return total

    serve(setting, step)


def wikift(setting: Setting, *, kind: str, compile: bool = False, deterministic: bool = False) -> None:
    """An engine of wikift's, on as many processes as torchrun started."""
    from tests.tiny_engines import make_engine
    from wikift.base.work import AdamSettings
    from wikift.base.world import be_deterministic, join_group, start_world
    from wikift.checkpoint.fragment import FreshStart
    from wikift.engines.memory import keep_freed_memory

    if deterministic:
        be_deterministic()
    keep_freed_memory()  # as launch/train.py does
    world = start_world(setting.device)
    if kind != "single":
        join_group(world)
    engine = make_engine(
        kind, world, setting.hf_config(), micro=setting.micro_batch, accumulation=setting.accumulation,
        precision=setting.precision, adam=AdamSettings(DECAY, 0.9, 0.999, 1e-8, 1.0), compile=compile,
    )  # fmt: skip
    weights = {name: tensor.detach().flatten().cpu() for name, tensor in setting.hf_model().named_parameters()}
    engine.restore(FreshStart(lambda name, start, stop: weights[name][start:stop]))
    weights.clear()
    blocks = setting.micro_batches(world.rank, world.size)

    def step() -> Tensor:
        total = torch.zeros((), device=setting.device)
        for place in range(setting.accumulation):
            total += engine.forward_backward(next(blocks), last=place == setting.accumulation - 1)
        engine.step(LR)
        return total / setting.accumulation

    serve(setting, step, world.size, world.rank)
    if world.size > 1:
        torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads would end the process by SIGABRT


def products(setting: Setting) -> None:
    """No training: the matrix products of a step's linear layers and its head, forward and backward, and nothing else.

    No contestant that makes them by torch can be faster, so this is what a ratio of two of them is bounded by.
    """
    rows, width = setting.micro_batch * setting.block, setting.width
    shapes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)] * setting.layers
    dtype = torch.bfloat16 if setting.precision == "bf16" else torch.float32

    def made(*sizes: tuple[int, int]) -> list[Tensor]:
        return [torch.rand(size, dtype=dtype, device=setting.device) for size in sizes]

    shapes.append((width, setting.vocabulary))
    layers = [made((rows, k), (k, n), (rows, n)) + made((rows, n), (rows, k), (k, n)) for k, n in shapes]

    def step() -> Tensor:
        for _ in range(setting.accumulation):
            for inputs, weight, of_outputs, outputs, of_inputs, of_weight in layers:
                torch.mm(inputs, weight, out=outputs)
                torch.mm(of_outputs, weight.t(), out=of_inputs)
                torch.mm(inputs.t(), of_outputs, out=of_weight)
        return torch.zeros(())

    serve(setting, step)


ENGINES = ("ddp", "fsdp", "zero1", "zero2", "zero3")
CONTESTANTS: dict[str, Callable[[Setting], None]] = {
    "Trainer": partial(trainer, compile=False),
    "Trainer, compiled": partial(trainer, compile=True),
    "plain loop, compiled": partial(hf_loop, compile=True),
    "nanoGPT's method, eager": partial(hand_written, pad=1, fused=False, compile=False),
    "nanoGPT's method": partial(hand_written, pad=1, fused=False, compile=True),
    "LitGPT's method": partial(hand_written, pad=512, fused=True, compile=True),
    "DeepSpeed, torch's AdamW": partial(deepspeed_loop, own_adam=False),
    "DeepSpeed, its AdamW": partial(deepspeed_loop, own_adam=True),
    "wikift": partial(wikift, kind="single"),
    "wikift, compiled": partial(wikift, kind="single", compile=True),
    "wikift --deterministic, 1 process": partial(wikift, kind="single", deterministic=True),
    **{f"wikift {kind}, 1 process": partial(wikift, kind=kind) for kind in ENGINES},
    **{f"wikift {kind}, 2 ranks": partial(wikift, kind=kind) for kind in ENGINES},
    PRODUCTS: products,
    **{f"wikift {kind}, 2 ranks, compiled": partial(wikift, kind=kind, compile=True) for kind in ("ddp", "fsdp")},
}


if __name__ == "__main__":
    given = Setting(**json.loads(sys.argv[2]))
    if "RANK" not in os.environ:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # the Trainer would take all there are
    torch.set_num_threads(given.threads)
    CONTESTANTS[sys.argv[1]](given)
