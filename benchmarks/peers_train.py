"""One contestant of benchmarks/train.py in a process of its own: `python -m benchmarks.peers_train NAME JSON`.

It trains on random tokens, says `{"first_step_s": ...}` after its first step (its compilation included), and then makes
as many steps as each line of its standard input says, answering with a line of JSON. nanoGPT's and LitGPT's methods are
rebuilt from their published design: one compiled model, logits in one piece, autocast. LitGPT pads the vocabulary.
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
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Setting:
    """The same for every contestant. `micro_batch` is a process', the tokens of a step are those of all of them."""

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

    def blocks(self) -> Iterator[Tensor]:
        random = torch.Generator().manual_seed(0)
        while True:
            yield torch.randint(self.vocabulary, (self.micro_batch, self.block + 1), generator=random)

    def autocast(self) -> Any:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16")

    def hf_config(self) -> Any:
        from wikift.model import model_config

        shape = {"n_layer": self.layers, "n_head": self.heads, "n_embd": self.width, "n_positions": self.block}
        rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), self.dropout)
        return model_config({**shape, **rates, "vocab_size": self.vocabulary, "bos_token_id": 0, "eos_token_id": 0})

    def hf_model(self) -> Any:
        from transformers import GPT2LMHeadModel

        torch.manual_seed(0)
        return GPT2LMHeadModel(self.hf_config()).train()


Step = Callable[[], None]


def serve(step: Step, ranks: int = 1, rank: int = 0) -> None:
    """The first step, then turns of as many as are asked for."""
    answer = partial(print, flush=True) if rank == 0 else lambda text: None
    start = time.perf_counter()
    step()
    answer(json.dumps({"first_step_s": time.perf_counter() - start}))
    step()
    while steps := _asked(ranks, rank):
        start, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        for _ in range(steps):
            step()
        seconds, now = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
        cpu = now.ru_utime - used.ru_utime + now.ru_stime - used.ru_stime
        answer(json.dumps({"step_s": seconds / steps, "cpu_s": cpu / steps, "peak_gb": now.ru_maxrss * 1024 / 1e9}))


def _asked(ranks: int, rank: int) -> int:
    steps = torch.tensor(int(sys.stdin.readline() or 0) if rank == 0 else 0)
    if ranks > 1:
        torch.distributed.broadcast(steps, 0)
    return int(steps)


class GPT(nn.Module):
    """GPT-2 as one writes it by hand, tied head, loss included."""

    def __init__(self, setting: Setting, vocabulary: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, setting.width), nn.Embedding(setting.block, setting.width)
        self.drop = nn.Dropout(setting.dropout)
        self.blocks = nn.ModuleList(Block(setting) for _ in range(setting.layers))
        self.norm = nn.LayerNorm(setting.width)
        self.head = nn.Linear(setting.width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        hidden = self.drop(self.tokens(inputs) + self.places(torch.arange(inputs.shape[1])))
        for block in self.blocks:
            hidden = block(hidden)
        return F.cross_entropy(self.head(self.norm(hidden)).flatten(0, 1), targets.flatten())


class Block(nn.Module):
    def __init__(self, setting: Setting) -> None:
        super().__init__()
        width = setting.width
        self.heads, self.rate = setting.heads, setting.dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop = nn.Dropout(setting.dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        rows, length, width = hidden.shape
        parts = self.qkv(self.norm1(hidden)).split(width, dim=2)
        q, k, v = (part.view(rows, length, self.heads, -1).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.rate)
        hidden = hidden + self.drop(self.out(mixed.transpose(1, 2).reshape(hidden.shape)))
        return hidden + self.drop(self.down(F.gelu(self.up(self.norm2(hidden)), approximate="tanh")))


def loop(setting: Setting, model: nn.Module, loss_of: Callable[[Tensor], Tensor], fused: bool) -> Step:
    """The plain loop: autocast, AdamW, clipping."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=fused)
    blocks = setting.blocks()

    def step() -> None:
        for _ in range(setting.accumulation):
            with setting.autocast():
                loss = loss_of(next(blocks))
            (loss / setting.accumulation).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def hand_written(setting: Setting, *, pad: int, fused: bool, compile: bool) -> None:
    torch.manual_seed(0)
    model = GPT(setting, -(-setting.vocabulary // pad) * pad)
    run: Any = torch.compile(model) if compile else model
    serve(loop(setting, model, lambda b: run(b[:, :-1], b[:, 1:]), fused))


def hf_loop(setting: Setting, *, compile: bool) -> None:
    model = setting.hf_model()
    run: Any = torch.compile(model) if compile else model
    serve(loop(setting, model, lambda b: run(input_ids=b[:, :-1], labels=b[:, :-1], use_cache=False).loss, True))


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Blocks as run_clm gives them to the Trainer."""

    def __init__(self, setting: Setting) -> None:
        self.rows = torch.randint(setting.vocabulary, (4096, setting.block), generator=torch.Generator().manual_seed(0))

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

    class Turns(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            done.release()
            turn.acquire()

    arguments = TrainingArguments(
        tempfile.mkdtemp(), use_cpu=True, bf16=setting.precision == "bf16", torch_compile=compile, report_to="none",
        per_device_train_batch_size=setting.micro_batch, gradient_accumulation_steps=setting.accumulation,
        max_steps=100_000, save_strategy="no", learning_rate=1e-4, weight_decay=0.1, disable_tqdm=True,
    )  # fmt: skip
    made = Trainer(setting.hf_model(), arguments, train_dataset=Rows(setting), callbacks=[Turns()])
    started = False

    def step() -> None:
        nonlocal started
        if started:
            turn.release()
        started = True
        done.acquire()

    def turns() -> None:  # beside the training, which stays in the main thread, as everybody's
        serve(step)
        os._exit(0)

    threading.Thread(target=turns, daemon=True).start()
    made.train()


def deepspeed_loop(setting: Setting) -> None:
    from wikift.engines.zero import import_deepspeed

    deepspeed = import_deepspeed()
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    config = {
        "train_micro_batch_size_per_gpu": setting.micro_batch, "gradient_accumulation_steps": setting.accumulation,
        "bf16": {"enabled": setting.precision == "bf16"}, "zero_optimization": {"stage": 1}, "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    model = setting.hf_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    with contextlib.redirect_stdout(sys.stderr):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    blocks = setting.blocks()

    def step() -> None:
        for _ in range(setting.accumulation):
            block = next(blocks)[:, :-1]
            engine.backward(engine(input_ids=block, labels=block, use_cache=False).loss)
            engine.step()

    serve(step)


def wikift(setting: Setting, kind: str, *, compile: bool) -> None:
    """An engine of wikift's, on as many processes as torchrun started."""
    from tests.engines import make_engine, random_start
    from wikift.optim import AdamSettings
    from wikift.world import start_world

    world = start_world("cpu")
    config = setting.hf_config()
    engine = make_engine(
        kind, world, config, micro=setting.micro_batch, accumulation=setting.accumulation, precision=setting.precision,
        adam=AdamSettings(0.1, 0.9, 0.999, 1e-8, 1.0), compile=compile,
    )  # fmt: skip
    engine.restore(random_start(config))
    blocks = setting.blocks()

    def step() -> None:
        for place in range(setting.accumulation):
            engine.forward_backward(next(blocks), last=place == setting.accumulation - 1)
        engine.step(1e-4)

    serve(step, world.size, world.rank)


CONTESTANTS: dict[str, Callable[[Setting], None]] = {
    "Trainer": partial(trainer, compile=False),
    "Trainer, compiled": partial(trainer, compile=True),
    "HF loop, compiled": partial(hf_loop, compile=True),
    "nanoGPT's method, eager": partial(hand_written, pad=1, fused=False, compile=False),
    "nanoGPT's method": partial(hand_written, pad=1, fused=False, compile=True),
    "LitGPT's method": partial(hand_written, pad=512, fused=True, compile=True),
    "DeepSpeed": deepspeed_loop,
    "wikift": partial(wikift, kind="single", compile=False),
    "wikift, compiled": partial(wikift, kind="single", compile=True),
    **{f"wikift {kind}, 2 ranks": partial(wikift, kind=kind, compile=False) for kind in ("ddp", "fsdp", "zero2")},
    **{f"wikift {kind}, 2 ranks, compiled": partial(wikift, kind=kind, compile=True) for kind in ("ddp", "fsdp")},
}


if __name__ == "__main__":
    given = Setting(**json.loads(sys.argv[2]))
    torch.set_num_threads(given.threads)
    CONTESTANTS[sys.argv[1]](given)
