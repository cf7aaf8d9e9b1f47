"""Training steps of wikift and of its peers, in turns, each in a process that lives through all rounds.

    python -m benchmarks.train                               # the peers, and wikift in one process
    python -m benchmarks.train --set engines                 # wikift's engines on one process
    python -m benchmarks.train --set ranks                   # and on two ranks, each with half the blocks and threads
    python -m benchmarks.train --accumulation 4 --best-micro-batch 4 8 16     # each at its best, same global batch
    python -m benchmarks.train --only "Trainer$|wikift$" --layers 12 --width 768 --heads 12 --block 128
    python -m benchmarks.train --layers 12 --width 768 --heads 12 --block 1024 --micro-batch 16 --steps 20   # on a GPU

Same weights, blocks, global batch, precision, dropout, AdamW and clipping. First each contestant shows, without
dropout, the losses of three steps on the same blocks, which must be those of a plain loop in fp32 (--no-check leaves
that out); so it is the same work. "The products alone" makes those of the linear layers and the head and nothing else:
the bound of what a contestant can do on this machine at this moment. Then tokens per second, floating-point operations
per second by the PaLM count (and their share of the peak, MFU, where a peak is known: not on a CPU), processor seconds
of a step, the most memory the process ever held (on a CPU its start and its compilation included), and the seconds to
the end of the first step: imports but torch's, building and compilation, with caches as they are. It all runs on a GPU
where there is one (--device), in bf16 where that is native. All processes hold their memory through all rounds, on a
GPU but for what torch's allocator has cached: --only where they do not fit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import sys
from collections.abc import Mapping, Sequence
from functools import partial

import torch

from benchmarks.harness import Process, cores, interleave, machine, median, options, table, write
from benchmarks.peers_train import CHECKED_STEPS, CONTESTANTS, PRODUCTS, Setting, loop
from wikift.base.shape import Shape
from wikift.model.gpt2 import resolve_precision
from wikift.training.meter import peak_flops

SETS = {
    "peers": r"^(?!.*(1 process|2 ranks))",
    "engines": r"^wikift(, compiled)?$|1 process",
    "ranks": r"^wikift(, compiled)?$|2 ranks",
}
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}  # of a loss of 11; DeepSpeed's bf16 rounds the weights themselves


def main() -> None:
    given = _parse()
    setting = Setting(**{f.name: getattr(given, f.name) for f in dataclasses.fields(Setting)})
    names = [name for name in CONTESTANTS if re.search(given.only or SETS[given.set], name)]
    checked = check([name for name in names if name != PRODUCTS], setting) if given.check_losses else {}
    chosen = dict.fromkeys(names, setting)
    if given.best_micro_batch:
        chosen = {name: best(name, setting, given.best_micro_batch, given.steps) for name in names}
    with contextlib.ExitStack() as stack:
        processes = {name: stack.enter_context(start(name, one)) for name, one in chosen.items()}
        turns = {name: partial(turn, name, process, chosen[name], given.steps) for name, process in processes.items()}
        figures = interleave(turns, given.rounds, uncounted=1)
        for name, process in processes.items():
            figures[name]["first step s"] = [process.first["first_step_s"]]
    against = next(name for name in (given.against, "Trainer", "wikift", *names) if name in figures)
    lines = table(figures, against=against, figure="tokens/s", also=["processor s a step"])
    if given.best_micro_batch:
        picked = ", ".join(f"{name} {one.micro_batch}" for name, one in chosen.items())
        lines += ["", f"Micro-batch of each, the best of {given.best_micro_batch}: {picked}."]
    if peak := peak_flops(torch.device(setting.device), setting.precision):
        shares = {name: median(figures, name, "model GFLOP/s") * 1e9 / (peak * _ranks(name)) for name in figures}
        told_shares = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
        lines += ["", f"MFU, of {peak / 1e12:,.0f} TFLOP/s a GPU: {told_shares}."]
    if checked:
        widest = max(checked.values())
        lines += [
            "",
            f"Losses of {CHECKED_STEPS} steps without dropout: within {widest:.1g} of the plain loop in fp32.",
        ]
    told = {key: value for key, value in dataclasses.asdict(setting).items() if key != "check"}
    write(
        given.name, "Training steps", lines, figures,
        settings={**told, "steps of a turn": given.steps},
        about=machine("transformers", "accelerate", "deepspeed"), folder=given.results,
        against=dict.fromkeys(figures, against),
    )  # fmt: skip


def _parse():  # type: ignore[no-untyped-def]
    parser = options(__doc__, "train", rounds=7)
    parser.add_argument("--steps", type=int, default=4, help="of one turn")
    parser.add_argument("--set", choices=SETS, default="peers", help="which contestants take part")
    parser.add_argument("--only", default="", help="or a pattern of their names")
    parser.add_argument("--against", default="Trainer")
    parser.add_argument("--no-check", dest="check_losses", action="store_false")
    parser.add_argument("--best-micro-batch", type=int, nargs="+", metavar="BLOCKS")
    for name, default in (("layers", 6), ("width", 384), ("heads", 6), ("block", 256), ("micro-batch", 4),
                          ("accumulation", 1), ("vocabulary", 50257), ("threads", cores())):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="default what the device does natively")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.set_defaults(check=False)
    given = parser.parse_args()
    native = resolve_precision("auto", torch.device(given.device)).name
    given.precision = given.precision or ("bf16" if native == "bf16" else "fp32")
    if given.name == "train":
        given.name += "-best" if given.best_micro_batch else "" if given.set == "peers" else f"-{given.set}"
    return given


def start(name: str, setting: Setting) -> Process:
    """The contestant past its first step. Two ranks share the blocks and the threads of one process."""
    ranks = _ranks(name)
    setting = dataclasses.replace(
        setting, micro_batch=max(1, setting.micro_batch // ranks), threads=max(1, setting.threads // ranks)
    )
    process = Process("benchmarks.peers_train", name, json.dumps(dataclasses.asdict(setting)), ranks=ranks)
    print(f"{name}: {process.first}", file=sys.stderr, flush=True)
    return process


def _ranks(name: str) -> int:
    return 2 if "2 ranks" in name else 1


def turn(name: str, process: Process, setting: Setting, steps: int) -> Mapping[str, float]:
    found = process.ask(steps)
    rate = setting.block * setting.micro_batch * setting.accumulation / found["step_s"]
    shape = Shape(setting.layers, setting.heads, setting.width, setting.block, setting.vocabulary)
    return {
        "tokens/s": rate,
        "model GFLOP/s": rate * shape.flops_per_token(setting.block) / 1e9,
        "processor s a step": found["cpu_s"] * _ranks(name),
        "peak GB": found["peak_gb"] * _ranks(name),
    }


def best(name: str, setting: Setting, sizes: Sequence[int], steps: int) -> Setting:
    """`setting` with the micro-batch of `sizes` at which this contestant is fastest, and the same global batch."""
    blocks, found = setting.micro_batch * setting.accumulation, {}
    for size in sizes:
        if blocks % size == 0 and size % _ranks(name) == 0:
            one = dataclasses.replace(setting, micro_batch=size, accumulation=blocks // size)
            try:
                with start(name, one) as process:
                    turn(name, process, one, steps)
                    found[turn(name, process, one, steps)["tokens/s"]] = one
            except RuntimeError as error:
                if "out of memory" not in str(error):
                    raise
    if not found:
        raise SystemExit(f"--best-micro-batch: none of {sizes} divides the {blocks} blocks of a step, and fits")
    return found[max(found)]


def check(names: Sequence[str], setting: Setting) -> dict[str, float]:
    """How far each contestant's losses are from the plain loop's in fp32 at most. Ends where that is too far.

    Trainer, plain loop and DeepSpeed are given labels in transformers' way, without the last token of each block.
    """
    exact = dataclasses.replace(setting, check=True, precision="fp32")
    expected = {}
    for whole in (False, True):
        model = exact.hf_model()
        step = loop(exact, model, partial(_loss, model, whole), fused=True)
        expected[whole] = [float(step()) for _ in range(CHECKED_STEPS)]
    asked = dataclasses.replace(setting, check=True)
    far = {}
    for name in names:
        with start(name, asked) as process:
            whole = name.startswith(("wikift", "nanoGPT", "LitGPT"))
            far[name] = max(abs(a - b) for a, b in zip(process.first["losses"], expected[whole], strict=True))
        if far[name] > TOLERANCE[asked.precision]:
            raise SystemExit(f"{name}: losses {process.first['losses']}, the plain loop's are {expected[whole]}")
    return far


def _loss(model: torch.nn.Module, whole: bool, blocks: torch.Tensor) -> torch.Tensor:
    inputs = blocks[:, :-1]
    targets = blocks[:, 1:] if whole else blocks[:, 1:-1]
    logits = model(input_ids=inputs, use_cache=False).logits[:, : targets.shape[1]]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


if __name__ == "__main__":
    main()
