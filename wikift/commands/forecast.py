"""The figures of the plan command: memory, disk and time of a run, each with its formula."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from wikift.base.errors import UserError
from wikift.base.files import parse_size, show_bytes
from wikift.base.launcher import launch
from wikift.settings.fields import PlanSettings, TrainSettings
from wikift.settings.resolve import command_of
from wikift.settings.run_plan import RunPlan, work_of
from wikift.watch.record import aligned

if TYPE_CHECKING:
    from wikift.base.work import Work
    from wikift.data.store import TokenStore
    from wikift.engines.memory import Machine

_DIVIDED, _OFFLOADED = ("ddp", "fsdp", "zero1", "zero2", "zero3"), ("zero2_offload", "zero3_offload")
_COLUMNS = ("engine", "blocks", "weights", "gradients", "optimizer", "activations", "logits", "buffers", "sum")


class Recommendation(NamedTuple):
    """What to type, and why; `fits`: the command as it was typed does, with this work."""

    work: Work | None
    fits: bool
    reason: str
    command: str


def machine_for(asked: PlanSettings, settings: TrainSettings, ranks: int) -> tuple[Machine, str, str]:
    """The machine that is planned for, the number format of its matmuls, and both in words."""
    import torch

    from wikift.base.world import World, device_of
    from wikift.engines.memory import FULL, Machine, machine_of
    from wikift.model.gpt2 import resolve_precision

    if asked.gpus is None and asked.gpu_memory is None:
        device, local = device_of(settings.device, launch()), launch().local_size
        machine = machine_of(World(device=device, local_size=local))._replace(ranks=ranks, local=local)
        precision = resolve_precision(settings.precision, device).name
        name = torch.cuda.get_device_name(device) if machine.gpu else "this machine's CPU"
    else:
        if asked.gpu_memory is None and not torch.cuda.is_available():
            raise UserError(f"--gpus {asked.gpus}: no GPU is here to tell its memory; add --gpu-memory 80GB")
        size = parse_size(asked.gpu_memory, "--gpu-memory") if asked.gpu_memory else torch.cuda.mem_get_info()[1]
        machine, name = Machine(ranks, ranks, size, int(size * FULL)), f"GPUs of {show_bytes(size)}"
        precision = {"auto": "bf16", "tf32": "fp32"}.get(settings.precision, settings.precision)
    return machine, precision, f"{ranks} x {name}, {precision}, {show_bytes(machine.room)} of it to fill"


def _work(settings: TrainSettings, run: RunPlan, precision: str, **changes: Any) -> Work:
    changed = dataclasses.replace(settings, **changes)
    work, config = work_of(changed, run.layout, run.model.shape, run.block_size, run.steps)
    return dataclasses.replace(run, work=work, deepspeed=config).in_precision(precision)


def recommend(
    typed: TrainSettings, run: RunPlan, machine: Machine, precision: str, before: tuple[str, int] | None
) -> Recommendation:
    """The command as it was typed where it fits, else the first that does: slower ways come later."""
    from wikift.engines.build import choose

    changes: list[dict[str, Any]] = [{}, {"gradient_checkpointing": True}]
    changes += [{"engine": "auto", "deepspeed": name, "fsdp_reshard": True} for name in _OFFLOADED if machine.gpu]
    problem = ""
    for change in changes:
        try:
            work = choose(_work(typed, run, precision, **change), machine, before)
        except UserError as error:
            problem = problem or error.problems[0]
            continue
        changed = dataclasses.replace(typed, **change)
        reason = f"engine {work.engine.name}, {work.engine.reason}" + (", for less does not fit" if change else "")
        return Recommendation(work, not change, reason, command_of(changed, machine.ranks))
    return Recommendation(None, False, problem, "")


def table(settings: TrainSettings, run: RunPlan, machine: Machine, precision: str) -> Iterator[str]:
    """The memory of a process under each engine with the largest micro-batch that fits, and the formulas."""
    from wikift.engines.build import choose
    from wikift.engines.memory import SYMBOLS, memory_parts

    rows, formulas = [list(_COLUMNS)], [f"formulas: {SYMBOLS}"]
    for name in ("single", *_DIVIDED * (machine.ranks > 1), *_OFFLOADED * (machine.gpu > 0)):
        deepspeed = name if name.startswith("zero") else None
        changes = {"engine": "auto" if deepspeed else name, "deepspeed": deepspeed, "fsdp_reshard": True}
        work, on = _work(settings, run, precision, **changes), machine
        if name == "single":
            work = dataclasses.replace(work, accumulation=work.accumulation * machine.ranks)
            on = machine._replace(ranks=1)
        try:
            work = choose(work, on)
        except UserError:
            work = dataclasses.replace(work, micro_batch=1)
        parts = memory_parts(work, on.ranks, gpu=machine.gpu)
        total = sum(part.bytes for part in parts.values())
        figures = [f"{part.bytes / 1e9:.2f}" for part in parts.values()]
        label = name + " (too much)" * (total > machine.room)
        rows.append([label, str(work.micro_batch), *figures, f"{total / 1e9:.2f}"])
        of_each = {kind: f"{kind} {part.formula}" for kind, part in parts.items()}
        common = f"  all: {of_each.pop('activations')}, {of_each.pop('logits')}"
        formulas.append(f"  {name}: {', '.join(of_each.values())}")
    yield from aligned(rows, right=True).splitlines()
    yield from [*formulas, common]


def disk(settings: TrainSettings, run: RunPlan, known: tuple[int, int] | None) -> Iterator[str]:
    """What is downloaded unless it is in the cache, and what the disk must hold."""
    parameters = run.model.shape.parameters
    model = 0 if settings.from_scratch or Path(settings.model).is_dir() else 4 * parameters
    if model or known:
        text = f" + {show_bytes(known[0])} of {(settings.dataset or ('',))[0]}" if known else ""
        yield f"download: about {show_bytes(model)} of the model (4P){text}, less what the cache has"
    each = 4 if settings.save_only_model else 12
    kept = settings.save_total_limit + 2
    size = each * parameters
    yield (
        f"disk: up to {show_bytes(kept * size)}, {kept} checkpoints of {each}P = {show_bytes(size)} "
        f"(--save-total-limit, the best, one being written), and {show_bytes(4 * parameters)} for the export (4P)"
    )


def speed_by_mfu(asked: PlanSettings, run: RunPlan, precision: str) -> tuple[float, str]:
    """Tokens per second of all ranks by --mfu, and the formula."""
    import torch

    from wikift.training.meter import peak_of

    name = asked.gpu or (torch.cuda.get_device_name() if torch.cuda.is_available() else "")
    peak = peak_of(name)
    if peak is None or precision == "fp32":
        raise UserError(
            f"--mfu {asked.mfu:g}: is a part of a GPU's peak in half precision, which is not known of "
            f"{name or 'no GPU'} in {precision}; name --gpu H100 and --precision bf16, or use --trial 20"
        )
    flops, ranks = run.model.shape.flops_per_token(run.block_size), run.layout.ranks
    speed = float(asked.mfu or 0) * peak * ranks / flops
    return speed, f"MFU {asked.mfu:g} x {ranks} x {peak / 1e12:,.0f} TFLOP/s / {flops / 1e6:,.0f} MFLOP a token"


def duration_of(run: RunPlan, store: TokenStore | None, speed: float) -> str:
    from wikift.watch.terminal import duration

    validations = run.due.validations()
    tokens = store.splits["validation"].tokens if store is not None and store.has_validation else 0
    tokens = min(tokens, run.eval_blocks * run.block_size or tokens)
    train, each = run.steps * run.tokens_per_step / speed, tokens / (3 * speed)
    text = f"{run.steps:,} steps {duration(train)}"
    if tokens:
        text += f", {validations:,} validations {duration(each * validations)} (a forward is a third of a step's work)"
    return f"time: about {duration(train + validations * each)} = {text}; start and saves come on top"
