"""Consolidation beside DeepSpeed's zero_to_fp32.py: time and peak memory of whole processes, on the same weights.

    python benchmarks/consolidate.py [--rounds 5] [--small]

Stock DeepSpeed trains a random gpt2 (124M) for one step under ZeRO-2 and ZeRO-3 on two gloo ranks and saves it; the
same weights and moments are saved as a checkpoint of wikift by two ranks. Then, in interleaved rounds, each program
makes its model file or directory; peak memory is the kernel's (ru_maxrss), beside that of the imports alone. All
results are compared bit for bit. Writes benchmarks/results/consolidate.json and .md. zero_to_fp32 writes a .bin: its
--safe_serialization fails on GPT-2's tied head.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results"
RANKS = 2
SMALL = {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 512, "n_positions": 64}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script; writes no results")
    parser.add_argument("--train", nargs=2, metavar=("STAGE", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--save", nargs=2, metavar=("MODEL", "RUN"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train_with_deepspeed(int(options.train[0]), Path(options.train[1]), options.small)
        return
    if options.save:
        save_with_wikift(*map(Path, options.save))
        return
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        result = measure(Path(folder), options.rounds, options.small)
    table = as_markdown(result)
    print(table)
    if not options.small:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "consolidate.json").write_text(json.dumps(result, indent=2) + "\n")
        (RESULTS / "consolidate.md").write_text(table)


def train_with_deepspeed(stage: int, folder: Path, small: bool) -> None:
    """One rank of the training: one AdamW step on random tokens, then stock save_checkpoint."""
    import deepspeed
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(**(SMALL if small else {}), bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    settings = {
        "train_batch_size": RANKS,
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
    }
    engine, *_ = deepspeed.initialize(model=model, config=settings, model_parameters=model.parameters())
    ids = torch.randint(0, config.vocab_size, (1, 32))
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    engine.save_checkpoint(folder)
    if engine.local_rank == 0:
        config.save_pretrained(folder)
        (folder / "tokenizer.json").write_text("{}")  # not looked into


def measure(folder: Path, rounds: int, small: bool) -> dict[str, Any]:
    flag = ["--small"] if small else []
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}", __file__]
    for stage in (2, 3):
        run([*ranks, "--train", str(stage), str(folder / f"zero{stage}"), *flag], folder / "log")
    consolidate = [sys.executable, str(ROOT / "launch" / "consolidate.py"), "--quiet"]
    programs: dict[str, list[str]] = {}
    for stage in (2, 3):
        source, script = folder / f"zero{stage}", folder / f"zero{stage}" / "zero_to_fp32.py"
        out = folder / f"out-{stage}"
        run([*consolidate, str(source), "--out", str(out)], folder / "log")
        run([*ranks, "--save", str(out), str(folder / f"run{stage}")], folder / "log")
        theirs = [sys.executable, str(script), str(source)]
        programs |= {
            f"zero_to_fp32, ZeRO-{stage}": [*theirs, str(folder / f"a{stage}")],
            f"wikift, the ZeRO-{stage} folder": [*consolidate, str(source), "--out", str(folder / f"c{stage}")],
            f"wikift, its own checkpoint (ZeRO-{stage})": [
                *consolidate, str(folder / f"run{stage}"), "--out", str(folder / f"d{stage}")
            ],
        }  # fmt: skip
    imports = {
        "import torch": [sys.executable, "-c", "import torch"],
        "import numpy": [sys.executable, "-c", "import numpy"],
    }
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in programs | imports}
    for number in range(rounds + 1):  # the first warms the caches up
        for name, command in (programs | imports).items():
            for made in folder.glob("[acd][23]"):
                if str(made) in command:
                    shutil.rmtree(made)
            figures = run(command, folder / "log")
            if number:
                taken[name].append(figures)
    for stage in (2, 3):
        compare([folder / f"{kind}{stage}" for kind in "acd"])
    medians = {
        name: {
            "seconds": round(statistics.median(seconds for seconds, _ in figures), 3),
            "seconds_all": [round(seconds, 3) for seconds, _ in figures],
            "peak_mb": round(statistics.median(memory for _, memory in figures), 1),
        }
        for name, figures in taken.items()
    }
    return {"machine": machine(), "rounds": rounds, "ranks": RANKS, "equal_bit_for_bit": True, "results": medians}


def run(command: list[str], log: Path) -> tuple[float, float]:
    """Wall seconds and peak resident MB of a whole process. Raises RuntimeError where it fails."""
    with open(log, "wb") as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command} failed:\n{log.read_text(errors='replace')[-3000:]}")
    return seconds, usage.ru_maxrss * 1024 / 1e6


def save_with_wikift(model: Path, folder: Path) -> None:
    """One rank of RANKS that save the weights in `model`, with moments, as a run of wikift's with one checkpoint."""
    import torch
    from safetensors import safe_open

    from wikift import __version__
    from wikift.base.world import start_world, stop_world
    from wikift.checkpoint.writer import Saver
    from wikift.engines.base import OPTIMIZER, SCALARS, STATES, Fragment
    from wikift.settings.fields import TrainSettings

    world = start_world("cpu")
    fragments, shapes = [], {}
    with safe_open(model / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(name)
            shapes[name] = list(tensor.shape)
            share = -(-tensor.numel() // world.size)  # as ZeRO-3 cuts
            start, shape = world.rank * share, tuple(tensor.shape)
            data = tensor.reshape(-1)[start : start + share]
            fragments += [Fragment(name, state, start, shape, data) for state in STATES]
    if world.rank == 0:
        fragments += [Fragment(OPTIMIZER, name, 0, (1,), torch.ones(1)) for name in SCALARS]
    config = json.loads((model / "config.json").read_text())
    saver = Saver(folder, world, keep=1, aside=False)
    saver.save(fragments, 1, {"tokens": 64, "model_config": config}, shapes)
    saver.finish()
    if world.rank == 0:
        shutil.copytree(model, folder / "model", ignore=shutil.ignore_patterns("*.safetensors", "wikift.json"))
        settings = dataclasses.asdict(TrainSettings(output_dir=str(folder)))
        (folder / "config.json").write_text(json.dumps({"wikift": __version__, "settings": settings}))
    stop_world()
    os._exit(0)  # gloo's threads would end the process by SIGABRT


def compare(folders: list[Path]) -> None:
    """Raises AssertionError where a weight differs by one bit."""
    import torch
    from safetensors.torch import load_file

    first, *others = (
        load_file(path / "model.safetensors")
        if (path / "model.safetensors").exists()
        else torch.load(path / "pytorch_model.bin", weights_only=True)
        for path in folders
    )
    for number, other in enumerate(others, 1):
        names = {name for name in other if name != "lm_head.weight"}
        assert names == {name for name in first if name != "lm_head.weight"}, folders[number]
        for name in names:
            assert torch.equal(first[name].view(torch.int32), other[name].view(torch.int32)), (folders[number], name)


def machine() -> dict[str, Any]:
    from importlib.metadata import version

    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0].split(":")[1].strip() if names else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "deepspeed", "numpy")},
    }


def as_markdown(result: dict[str, Any]) -> str:
    place, figures = result["machine"], result["results"]
    lines = [
        "# Consolidation beside DeepSpeed's zero_to_fp32.py", "",
        f"Random gpt2 (124M), {result['ranks']} ranks, medians of {result['rounds']} interleaved rounds of whole "
        "processes; all results equal bit for bit. `python benchmarks/consolidate.py`", "",
        f"{place['cpu']}, {place['cores']} cores; Python {place['python']}, torch {place['torch']}, "
        f"DeepSpeed {place['deepspeed']}.", "",
        "| program | seconds | of zero_to_fp32 | peak MB |", "|---|---:|---:|---:|",
    ]  # fmt: skip
    for name, values in figures.items():
        stage = next((s for s in "23" if f"ZeRO-{s}" in name), None)
        ratio = f"{values['seconds'] / figures[f'zero_to_fp32, ZeRO-{stage}']['seconds']:.2f}" if stage else ""
        lines.append(f"| {name} | {values['seconds']:.2f} | {ratio} | {values['peak_mb']:,.0f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
