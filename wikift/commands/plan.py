"""The plan command, and train's --dry-run: what a training would be, need and take. It writes nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wikift.base.command import command_line
from wikift.base.console import print
from wikift.base.errors import EXIT_DONE, EXIT_USER, UserError
from wikift.base.files import json_line
from wikift.base.launcher import launch
from wikift.base.names import WIKITEXT
from wikift.commands.train import checked_files, plan_of, resolved, without_local_rank
from wikift.settings.batch_layout import batch_layout
from wikift.settings.fields import PlanSettings, TrainSettings
from wikift.settings.options import Parsed, parse_all
from wikift.settings.resolve import store_path
from wikift.settings.run_plan import RunPlan, apply_scratch, plan_run
from wikift.training.resume import earlier_choice, planned_start

if TYPE_CHECKING:
    from wikift.base.shape import Shape
    from wikift.data.store import TokenStore

_TEST_STEPS = 100  # of a range test, as fast.ai's
_BARS = 20  # lines of its curve
_MANY = 10**12  # tokens of a text of unknown length


def main(argv: Sequence[str]) -> int:
    text, fits = plan(parse_all(PlanSettings, without_local_rank(argv)))
    if launch().rank:  # the launcher ends all ranks when one fails: let the first do it when it has spoken
        return EXIT_DONE
    print(text, flush=True)
    return EXIT_DONE if fits else EXIT_USER


def plan(parsed: Parsed[PlanSettings]) -> tuple[str, bool]:
    """A config file with what follows from it as comments; and whether the run would fit into memory."""
    from wikift.data.store import open_store

    asked, ranks = parsed.settings, max(1, parsed.settings.gpus or launch().size)
    settings, notes = resolved(parsed, ranks, [*_problems(asked)])
    path = Path(settings.data) if settings.data is not None else store_path(settings)
    store = open_store(path) if settings.data is not None or (path / "store.json").exists() else None
    shape, comments = checked_files(settings, store)
    fits = True
    if shape is None:
        comments.append(f"{settings.model}: what it needs is known when its shape is")
    else:
        lines, fits = _derived(asked, settings, store, shape)
        comments = [*lines, *comments]
    # a comment in TOML has no control characters, a path may
    clean = ["".join(sign if sign.isprintable() else "?" for sign in text) for text in comments]
    heads = (*(f"# {note}" for note in notes), *settings_file(settings), "", "# derived")
    return "\n".join([*heads, *(f"# {text}".rstrip() for text in clean)]), fits


def _problems(asked: PlanSettings) -> Iterator[str]:
    if asked.device == "cpu" and (asked.gpus or asked.gpu_memory):
        yield "--device cpu: has no effect on GPUs; remove it, or --gpus and --gpu-memory"
    if asked.gpu is not None and asked.mfu is None:
        yield f"--gpu {asked.gpu}: has no effect without --mfu; add --mfu 0.4, or remove it"


def settings_file(settings: TrainSettings) -> Iterator[str]:
    yield "# settings: a file that --config takes"
    for field in dataclasses.fields(TrainSettings):
        value = getattr(settings, field.name)
        if value is not None and field.name not in ("config", "dry_run"):
            yield f"{field.name} = {json_line(value)}"  # JSON's values are TOML's too


def _derived(
    asked: PlanSettings, settings: TrainSettings, store: TokenStore | None, shape: Shape
) -> tuple[list[str], bool]:
    """What follows from the settings, a line each; and whether the run would fit into memory."""
    from wikift.commands import forecast

    ranks = max(1, asked.gpus or launch().size)
    layout, notes, start = batch_layout(settings, ranks), list[str](), None
    known = WIKITEXT.get((settings.dataset or ("",))[0]) if store is None else None
    if store is not None:
        run = plan_of(settings, layout, store, shape)
        begins, start = planned_start(run, store, notes.append)
        notes.insert(0, f"starts: {begins}")
    else:
        shape = apply_scratch(settings, shape, None)
        run = plan_run(settings, layout, shape, known[1] if known else _MANY, shape.vocab_size)
        prepared = f"is prepared (by {command_line('prepare')}, or by the run itself)"
        notes.append(f"steps of an epoch: known{' exactly' if known else ''} when {store_path(settings)} {prepared}")
    machine, precision, about = forecast.machine_for(asked, settings, ranks)
    choice = forecast.recommend(asked, run, machine, precision, earlier_choice(start, ranks))
    summary = run.summary
    if store is None and known is None:
        unknown = ("train blocks", "steps", "warm-up steps", "decay steps")[: 4 if settings.max_steps is None else 1]
        summary = {name: text for name, text in summary.items() if name not in unknown}
    if choice.work is not None and choice.fits:
        layout = dataclasses.replace(run, work=choice.work).layout
    lines = [f"batch: {layout.words}", *(f"{name}: {text}" for name, text in summary.items()), *notes]
    lines += ["", f"memory of a process in GB, {about}:"]
    lines += [*forecast.table(settings, run, machine, precision), "", *forecast.disk(settings, run, known)]
    lines += [*_time(asked, run, store, precision, summary)]
    lines += ["", f"recommended: {choice.reason}", *([f"  {choice.command}"] if choice.command else [])]
    return lines, choice.fits


def _time(
    asked: PlanSettings, run: RunPlan, store: TokenStore | None, precision: str, summary: dict[str, str]
) -> Iterator[str]:
    """What a trial measured or --mfu computes, and the whole run's time by it."""
    from wikift.commands import forecast

    speed = None
    if asked.trial or asked.find_lr:
        if store is None:
            option = "--find-lr" if asked.find_lr else f"--trial {asked.trial}"
            raise UserError(f"{option}: there is no token store yet; make it with {command_line('prepare')} first")
        from wikift.training import trial

        steps = asked.trial or _TEST_STEPS
        lrs = trial.rising(steps) if asked.find_lr else [run.schedule.lr_at(n) for n in range(1, steps + 1)]
        tried = trial.try_steps(run, store, lrs, lambda text: None)
        yield f"measured in {steps} steps: {tried.memory.removeprefix('memory: ')}"
        speed, how = tried.tokens_per_second, "measured"
        if asked.find_lr:
            yield from _curve(lrs, trial.smoothed(tried.losses))
    elif asked.mfu is not None:
        speed, how = forecast.speed_by_mfu(asked, run, precision)
    if speed is None:
        yield "time: not known; --trial 20 measures it here, --mfu 0.4 computes it of a GPU"
        return
    yield f"speed: {speed:,.0f} tokens/s, {run.tokens_per_step / speed:.3g} s a step ({how})"
    if "steps" in summary:
        yield forecast.duration_of(run, store, speed)


def _curve(lrs: Sequence[float], losses: Sequence[float]) -> Iterator[str]:
    lowest, highest = min(losses), max(losses)
    yield f"loss by learning rate, smoothed, {lowest:.4f} to {highest:.4f}:"
    for lr, loss in [*zip(lrs, losses, strict=False)][:: max(1, -(-len(losses) // _BARS))]:
        share = (loss - lowest) / max(1e-9, highest - lowest)
        yield f"  {lr:.1e}  {loss:8.4f}  {'#' * round(1 + 40 * share)}"
    at = lrs[losses.index(lowest)]
    yield f"proposed: --learning-rate {at / 10:.1e}, a tenth of {at:.1e}, where the loss is lowest"
