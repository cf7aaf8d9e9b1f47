"""Everything that wants a GPU, on one: tests, losses, resume, speed, memory and kernels, in at most 12 minutes.

    make gpu                                                 # or: python -m benchmarks.gpu [--only PATTERN]
    python -m benchmarks.gpu --pretended [--small]           # on tests/cuda/pretended.py's, without a GPU

Each part is a command of wikift's or a benchmark in a process of its own, of at most two minutes, the most important
first. As it ends a line of JSON is added to benchmarks/results/gpu-HARDWARE.jsonl; the next start leaves out what is
measured there on the same hardware by the same torch, and tries what failed once more, last. No network is needed:
weights and tokens are random. A pretended GPU has no numbers: `not_measured` names what a part would say besides. Exit
code 1 where a part failed, or is still to be measured.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import RESULTS, ROOT, cores, gpus
from benchmarks.train import SETTINGS
from tests.tiny import arguments, curve, tiny_store
from wikift.base.files import parse_size

Figures = dict[str, Any]
PRETENDED = "tests.cuda.pretended"
LAUNCHER = ("torch.distributed.run", "--standalone", "--nproc_per_node=1", "-m")
VOCABULARY = 50257
PEERS = ("wikift, compiled", "plain loop, compiled", "Trainer", "wikift", "Trainer, compiled")
ENGINES: dict[str, Figures] = {
    "ddp": {"engine": "ddp"},
    "fsdp": {"engine": "fsdp"},
    **{f"zero{stage}": {"deepspeed": f"zero{stage}"} for stage in (1, 2, 3)},
}
ATTENTION = "flash|fmha|cudnn|sdpa|attention"
LIMIT = 120.0  # seconds of a part
# A pretended GPU runs no Triton, moves no other library's fakes and has no numbers; of figures it has these.
NEEDS_GPU = "compiled|marked|profile|attention|generation|Trainer"
COUNTED = ("peak GB", "forecast GB", "forecast / peak", "peak_gb", "allowed", "pytest")


class Run(NamedTuple):
    """Where and how the parts are measured."""

    folder: Path  # of what they leave on the disk
    pretended: bool
    small: bool
    deadline: float = 0.0

    def __call__(self, module: str, *words: object, answers: str = "") -> str:
        """What `python -m MODULE WORDS` prints, given `answers` to read. Raises RuntimeError where it fails."""
        launched = LAUNCHER if "ddp" in words else ()
        start = [sys.executable, "-m", *launched, *[PRETENDED] * self.pretended, module, *map(str, words)]
        limit = ["timeout", "-k", "5", f"{max(1.0, self.deadline - time.monotonic()):.0f}"]
        ran = subprocess.run(
            [*limit, *start], cwd=ROOT, input=answers, capture_output=True, text=True, errors="replace"
        )
        if ran.returncode == 124:
            raise TimeoutError(f"{module} was not through in time")
        if ran.returncode:
            raise RuntimeError(f"{module} ended with {ran.returncode}:\n{ran.stdout[-1000:]}\n{ran.stderr[-1500:]}")
        return ran.stdout

    def words(self, name: str, **settings: Any) -> list[str]:
        """Settings of a training in gpt2's shape, on random tokens, from random weights."""
        shape = "n_layer=2,n_positions=1024" if self.small else "n_positions=1024"
        defaults = {"config_overrides": shape, "block_size": 1024, "device": "cuda", "dropout": 0.1, "resume": "never"}
        return arguments(tokens(self.folder), self.folder / name, **defaults | settings)


@cache
def tokens(folder: Path) -> Path:
    """A store of gpt2's vocabulary."""
    return tiny_store(folder / "tokens", train=2_000_000, validation=5_000, vocabulary=VOCABULARY)


def marked(run: Run) -> Figures:
    """The tests marked `gpu`."""
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in path.read_text()]
    return {"pytest": run("pytest", "-q", "-m", "gpu", *files).splitlines()[-1]}


def trained(run: Run, name: str, **settings: Any) -> list[tuple[Any, ...]]:
    """The losses and gradient norms of a small model in six steps."""
    shape = {"config_overrides": "n_layer=2,n_head=4,n_embd=256,n_positions=128", "block_size": 128}
    length = {"max_steps": 6, "learning_rate": 1e-3, "save_steps": 3, "eval_steps": 3}
    run("wikift", "train", *run.words(name, **shape | length | settings))
    return curve(run.folder / name)


@cache
def on_cpu(folder: Path) -> list[tuple[Any, ...]]:
    """What a CPU computes in fp32."""
    return trained(Run(folder, False, False, time.monotonic() + 60), "cpu", device="cpu", dropout=0)


def losses(run: Run, most: float, **settings: Any) -> Figures:
    """How far losses and gradient norms are from a CPU's."""
    pairs = [*zip(trained(run, "device", dropout=0, **settings), on_cpu(run.folder), strict=True)]
    far = {name: max(abs(a[at] / b[at] - 1) for a, b in pairs) for at, name in ((1, "loss"), (2, "norm"))}
    if max(far.values()) > most and not run.pretended:
        raise RuntimeError(f"relative differences from the CPU's, of which {most} is allowed: {far}")
    return {"furthest, relative": far, "allowed": most}


def resumed(run: Run, **settings: Any) -> Figures:
    """A run that is resumed in its middle against one that is not, dropout on, and against the same once more."""
    settings |= {"deterministic": True, "precision": "bf16"}
    settings |= {"on_nonfinite": "skip"} if run.pretended else {}  # its AdamW has counted no step
    full, again = (trained(run, name, **settings) for name in ("full", "again"))
    rest = trained(run, "rest", **settings, resume=run.folder / "full" / "checkpoints" / "step-00000003")
    if full != again or full[3:] != rest:
        raise RuntimeError(f"not the same to the bit:\n{full}\n{again}\n{rest}")
    return {"equal to the bit": "two runs, and one resumed at step 3 of 6"}


def speed(run: Run, micro_batch: int = 32, model: str = "gpt2", **settings: Any) -> Figures:
    """Steps by `wikift plan --trial`, and what it forecast."""
    size = {"global_batch_size": micro_batch, "per_device_train_batch_size": micro_batch, "model": model}
    how = {"trial": 13, "max_steps": None, "precision": "auto", "no_compile": "compile" not in settings}
    text = run("wikift", "plan", *run.words("none", **size | how | settings))
    sizes = re.findall(r"steps: (.+) a process at its peak, (.+) forecast", text)[0]
    rate, step = re.findall(r"speed: ([\d,]+) tokens/s, (\S+) s a step", text)[0]
    held, expected = (parse_size(size, "memory") / 1e9 for size in sizes)
    memory = {"peak GB": held, "forecast GB": expected, "forecast / peak": round(expected / max(1e-9, held), 3)}
    return memory | {"tokens/s": float(rate.replace(",", "")), "s a step": float(step)}


def peer(run: Run, name: str) -> Figures:
    """A contestant of benchmarks/train.py, in gpt2's shape."""
    layers, blocks = (2, 2) if run.small else (12, 32)
    values = (layers, 768, 12, 1024, blocks, 1, VOCABULARY, 0.1, "bf16", cores(), "cuda")
    setting = json.dumps(dict(zip(SETTINGS, values, strict=True)))
    text = run("benchmarks.train", "--contestant", name, setting, answers="2\n10\n")
    first, _, last = (json.loads(line) for line in text.splitlines() if line.startswith('{"'))
    return {"tokens/s": blocks * 1024 / last["step_s"], **last, **first}


def kernels(run: Run, what: str) -> Figures:
    """A part of benchmarks/kernels.py."""
    few = ["--blocks", 1, "--rounds", 1] if run.small else []
    return {"each": json.loads(run("benchmarks.kernels", what, *few).splitlines()[-1])}


def generation(run: Run) -> Figures:
    """wikift's and transformers' `generate`."""
    few = ["--new-tokens", 4, "--rounds", 1] if run.small else ["--rounds", 3]
    run("benchmarks.generate", "--device", "cuda", *few, "--results", run.folder)
    return dict(json.loads((run.folder / "generate.json").read_text())["rounds"])


def profiled(run: Run) -> Figures:
    """Three steps of gpt2: kernels by time, those of attention, and how long the GPU had nothing to do."""
    size = {"global_batch_size": 32, "per_device_train_batch_size": 32, "max_steps": 6, "profile": 3}
    seldom = {"save_steps": 100, "eval_steps": 100, "max_eval_samples": 2, "save_only_model": True}
    line = run.words("profiled", **size | seldom, precision="bf16", quiet=False)
    text = run("wikift", "train", *line)
    with gzip.open(run.folder / "profiled" / "profile" / "trace.json.gz") as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("cat") == "kernel"]
    taken = Counter[str]()
    for event in events:
        taken[event["name"][:120]] += event["dur"] / 1000
    span = max((e["ts"] + e["dur"] for e in events), default=0) - min((e["ts"] for e in events), default=0)
    return {
        "table": text[max(0, text.find(" steps of ") - 2) :][:1500],
        "kernels, ms": dict(taken.most_common(15)),
        "attention, ms": {name: ms for name, ms in taken.items() if re.search(ATTENTION, name, re.IGNORECASE)},
        "idle": 1 - sum(taken.values()) / (span / 1000) if span else None,
        "launches": len(events),
    }


def parts() -> dict[str, Callable[[Run], Figures]]:
    """All there are, the most important first."""
    every: dict[str, Callable[[Run], Figures]] = {
        "tests marked gpu": marked,
        "losses: single": partial(losses, most=1e-4),
        "losses: bf16": partial(losses, most=5e-2, precision="bf16"),
        "losses: compiled": partial(losses, most=1e-4, compile=True),
        **{f"losses: {name}": partial(losses, most=1e-4, **words) for name, words in ENGINES.items()},
        "resume: single": resumed,
        "profile": profiled,
        "attention by kernel": partial(kernels, what="attention"),
    }
    for size in (32, 8, 64, 16):
        every[f"gpt2, {size}"] = partial(speed, micro_batch=size)
        every[f"gpt2, {size}, compiled"] = partial(speed, micro_batch=size, compile=True)
    every["gpt2, 32, dropout 0"] = partial(speed, dropout=0)
    every["gpt2, 32, compiled, dropout 0"] = partial(speed, compile=True, dropout=0)
    every |= {f"peers: {name}": partial(peer, name=name) for name in PEERS}
    for model, size in (("gpt2-medium", 16), ("gpt2-large", 8), ("gpt2-xl", 8)):
        every[f"{model}, {size}"] = partial(speed, model=model, micro_batch=size)
    every |= {f"gpt2, 32, {name}": partial(speed, **words) for name, words in ENGINES.items()}
    return every | {
        "generation": generation,
        "head by kernel": partial(kernels, what="head"),
        "gpt2, 32, compiled, residual bf16": partial(speed, compile=True, residual_dtype="bf16"),
        "resume: fsdp": partial(resumed, engine="fsdp"),
    }


def measured(run: Run, name: str, measure: Callable[[Run], Figures], seconds: float) -> Figures:
    """The line of the part `name`."""
    if run.pretended and re.search(NEEDS_GPU, name):
        return {"part": name, "result": "skipped", "not_measured": ["all of it"]}
    begun, line = time.monotonic(), Figures(part=name)
    try:
        figures = measure(run._replace(deadline=begun + seconds))
        unreal = [figure for figure in figures if run.pretended and figure not in COUNTED]
        line |= {"result": "measured", "not_measured": unreal}
        line["figures"] = {figure: value for figure, value in figures.items() if figure not in unreal}
    except Exception as error:  # the next part is measured whatever became of this one
        line |= {"result": "failed", "error": f"{type(error).__name__}: {error}"}
    return line | {"seconds": round(time.monotonic() - begun, 1)}


def main() -> int:
    """Measure what is not measured yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--only", default="", metavar="PATTERN", help="of the parts' names")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="default benchmarks/results")
    parser.add_argument("--pretended", action="store_true")
    parser.add_argument("--small", action="store_true", help="small models, to try the script itself")
    asked = parser.parse_args()
    end = time.monotonic() + 60 * asked.minutes
    names = ["pretended"] if asked.pretended else gpus()
    if not names:
        parser.error("there is no GPU here (nvidia-smi names none); --pretended tries the script without one")
    about = {"hardware": names[0], "small": asked.small} | {name: version(name) for name in ("torch", "transformers")}
    path = asked.results / f"gpu-{re.sub('[^a-z0-9]+', '-', about['hardware'].lower())}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    before = {line["part"]: line["result"] for line in lines if about.items() <= line.items()}
    todo = [name for name in parts() if re.search(asked.only, name) and before.get(name, "failed") == "failed"]
    ended = Counter[str]()
    with tempfile.TemporaryDirectory(prefix="wikift-gpu-") as work, path.open("a", encoding="utf-8") as file:
        run = Run(Path(work), asked.pretended, asked.small)
        for name in sorted(todo, key=before.__contains__):
            if (seconds := min(LIMIT, end - time.monotonic())) < 10:
                ended["left for the next start"] += 1
                continue
            line = json.dumps(measured(run, name, parts()[name], seconds) | about | {"date": time.strftime("%F %T")})
            ended[json.loads(line)["result"]] += 1
            print(line, file=file, flush=True)
            print(line, flush=True)
    print(f"{path}: {dict(ended)}")
    return int(bool(ended.keys() - {"measured", "skipped"}))


if __name__ == "__main__":
    sys.exit(main())
