"""Where a run resumes, whether it may, and who may write to its folder."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wikift.base.errors import EnvironmentFault, UserError
from wikift.base.files import faults_of_writing, json_line, read_jsonl, remove, replace_json, replace_text, sealed, sync
from wikift.base.folders import METRICS, RUN_FILES, SAMPLES, STACKS, WANDB_ID, list_checkpoints, step_folder, step_of
from wikift.base.launcher import launch
from wikift.base.publish import folder_lock, folders_above
from wikift.checkpoint import reader
from wikift.checkpoint.reader import Checkpoint
from wikift.settings.run_plan import RunPlan, changed_settings
from wikift.training.patience import Patience
from wikift.watch.record import read_metrics

if TYPE_CHECKING:  # a dry run does not wait for torch
    from wikift.base.world import World
    from wikift.data.store import TokenStore

Say = Callable[[str], None]

_LOCK_SECONDS = 60
FOLDER_GONE = 1 << 17  # among the signals that ask for a stop
_ASIDE = ".before.partial"
_MOST_DEATHS = 3  # after the same step: a restart helps no more


def checkpoint_to_resume(plan: RunPlan, world: World) -> Checkpoint | None:
    """The checkpoint that --resume means, None for a new run. Collective."""
    if plan.resume == "never":
        return None
    if plan.resume == "auto":
        return reader.newest_sound(plan.output_dir, world)
    return reader.open_sound(Path(plan.resume), world)


def earlier_choice(start: Checkpoint | None, ranks: int) -> tuple[str, int] | None:
    """The engine and the micro-batch that `start` was computed with, on as many ranks; None for a new run."""
    before, *choice = start.manifest.get("layout", (0,)) if start is not None else (0,)
    return (str(choice[0]), int(choice[1])) if before == ranks else None


def planned_start(plan: RunPlan, store: TokenStore, say: Say) -> tuple[str, Checkpoint | None]:
    """Where the run would start, in words, and from what, as can be seen without reading the checkpoint's content.

    Raises UserError where the run would, and says what changed, as `check_resumable` does.
    """
    saved = list_checkpoints(plan.output_dir)
    if plan.resume == "never" or (plan.resume == "auto" and not saved):
        return "at step 1; what is in the output folder is moved aside" if saved else "at step 1", None
    candidates = saved[::-1] if plan.resume == "auto" else [Path(plan.resume)]
    for path in candidates:
        try:
            start = reader.open_checkpoint(path)
            break
        except (UserError, EnvironmentFault):
            if path == candidates[-1]:
                raise
    if finished := check_resumable(plan, store, start, say):
        return f"finished, step {start.step:,}; {finished}", start
    return f"after step {start.step:,} of {start.path}, if that is valid", start


def experiment(plan: RunPlan, store: TokenStore) -> dict[str, Any]:
    """What the losses of a run depend on beyond its schedule: where any of these changed it is another run."""
    return {"data": store.fingerprint, **plan.experiment}


def check_resumable(plan: RunPlan, store: TokenStore, start: Checkpoint, say: Say) -> str:
    """Say what changed since `start` was written; returns what would continue the run where it is finished.

    Raises UserError where it would become another experiment, or where it is finished and would train nothing of a
    changed schedule.
    """
    before, old, problems = start.manifest["experiment"], start.manifest["settings"], []
    for name, value in experiment(plan, store).items():
        if before.get(name) == value:
            continue
        if name == "data":
            problems.append(f"--data {store.path}: is other data than this run was started on")
        else:
            problems.append(f"{name} {value}: this run was started with {before.get(name)}")
    schedule, finished = changed_settings(old, plan.settings, "schedule"), _why_finished(plan, start)
    if start.step == plan.steps:  # the same length in other words
        schedule = {name: pair for name, pair in schedule.items() if name not in ("--max-steps", "--num-train-epochs")}
    if finished and not problems:
        problems = [
            f"{name}{f' {new}' if new is not None else ''}: trains nothing, {plan.output_dir} is finished with {before}"
            for name, (before, new) in schedule.items()
        ]
    if start.manifest.get("weights_alone") and not finished:
        raise UserError(
            f"--resume {plan.resume}: {start.path} has weights alone (--save-only-model), so no run resumes from it; "
            "--resume never trains from the start, and --model with the consolidated run continues from its weights"
        )
    if problems:
        way_out = "; use the old value, another --output-dir, or --resume never (the old run is moved aside)"
        raise UserError(*(problem + way_out for problem in problems))
    changed = schedule | changed_settings(old, plan.settings, "placement")
    if changed and not finished:
        say("changed since the checkpoint: " + ", ".join(f"{n} {was} -> {now}" for n, (was, now) in changed.items()))
    return finished


def _why_finished(plan: RunPlan, start: Checkpoint) -> str:
    """What would continue the run where it has come to its end with `start`; else nothing."""
    if start.step >= plan.steps:
        return "a longer --max-steps or --num-train-epochs resumes it"
    patience = Patience.of(start.manifest, plan.patience)
    if not patience.spent:
        return ""
    return f"{patience.worse} validations were no better; a larger --early-stopping-patience resumes it"


def owed_line(plan: RunPlan, store: TokenStore, start: Checkpoint | None) -> dict[str, Any] | None:
    """The line of metrics.jsonl of `start`'s step where a stop came before its validation or its sample; else None."""
    if start is None or start.manifest["weights_alone"]:
        return None
    score = store.has_validation and plan.due.evaluate(start.step) and start.manifest["eval_loss"] is None
    samples = [row for row in read_jsonl(plan.output_dir / SAMPLES) if row.get("step") == start.step]
    sample = plan.due.sample(start.step) and len(samples) < len(plan.prompts) and _is_own(plan.output_dir, start)
    if not score and not sample:
        return None
    lines = read_jsonl(plan.output_dir / METRICS)
    rows = (values for values in lines if values.get("step") == start.step and "event" not in values)
    return next(rows, {"step": start.step})


def count_deaths(run: Path, world: World, after_step: int) -> None:
    """Where torchrun has restarted the ranks, say so in metrics.jsonl, with the last step before. Collective.

    Raises UserError where they have died after this step too often in a row.
    """
    here = launch()
    if not here.restarts:
        return
    reached = times = 0
    if here.restarted and world.rank == 0:
        lines = read_metrics(run / METRICS)
        reached = max([0, *(line["step"] for line in lines), *map(step_of, list_checkpoints(run))])
        before = [line.get("after") for line in lines if line.get("event") == "restart"]
        own = min(here.restarted, _MOST_DEATHS) - 1  # of this launch: the same command typed again counts anew
        times = 1 + before[len(before) - own :].count(reached)
        text = f"restart {here.restarted} of {here.restarts}, after step {reached:,}; processes: {world.size}"
        event = {"step": after_step, "event": "restart", "message": text, "after": reached}
        with faults_of_writing(run):
            replace_text(run / METRICS, "".join(json_line(line) + "\n" for line in [*lines, event]))
    if world.shared(times) >= _MOST_DEATHS:
        raise UserError(
            f"--max-restarts {here.restarts}: the run died {_MOST_DEATHS} times in a row after step {reached:,}, a "
            f"restart does not help; see why it died first, above or in {run / STACKS}; the same command resumes"
        )


def add_to_manifest(run: Path, start: Checkpoint | None, world: World, facts: dict[str, Any]) -> None:
    """Write `facts` into the manifest of the run's own checkpoint `start`, by one rename."""
    if start is not None and world.rank == 0 and _is_own(run, start):
        replace_json(start.path / "manifest.json", sealed({**start.manifest, **facts}))


def _is_own(run: Path, start: Checkpoint) -> bool:
    return start.path.absolute() == step_folder(run, start.step).absolute()


def set_aside(run: Path, start: Checkpoint | None) -> None:
    """Move what an earlier run left, or what it wrote after `start`, into before-N: nothing of the user's is lost.

    One rename makes it before-N; until then `clear_leftovers` moves all of it back.
    """
    if start is None:
        stale = [run / name for name in RUN_FILES if os.path.lexists(run / name)]
        if not list_checkpoints(run):  # killed before its first checkpoint: nothing worth keeping
            stale = [path for path in stale if path.name == "hf"]
            (run / WANDB_ID).unlink(missing_ok=True)
    else:
        stale = [path for path in list_checkpoints(run) if step_of(path) > start.step]
        if stale and (run / WANDB_ID).exists():
            stale.append(run / WANDB_ID)  # Weights & Biases drops steps that its run has already
    if stale:
        number = next(n for n in range(1, 10**6) if not os.path.lexists(run / f"before-{n}"))
        aside = run / _ASIDE
        aside.mkdir()
        for path in stale:
            target = aside / path.relative_to(run)
            target.parent.mkdir(exist_ok=True)
            os.rename(path, target)
        if start is not None and (run / METRICS).exists():
            shutil.copyfile(run / METRICS, aside / METRICS)
            sync(aside / METRICS)
        for folder in (*aside.glob("checkpoints"), aside):
            sync(folder)
        os.rename(aside, run / f"before-{number}")
        sync(run)


def clear_leftovers(run: Path) -> None:
    """Remove what a killed process wrote and did not publish, and move back what it had not wholly set aside."""
    aside = run / _ASIDE
    if aside.is_dir() and not aside.is_symlink():
        for pattern in ("*", "checkpoints/*"):
            for path in aside.glob(pattern):
                target = run / path.relative_to(aside)
                if not os.path.lexists(target) and not path.parent.is_symlink():
                    os.rename(path, target)
    if (run / STACKS).is_symlink():  # no run made it
        (run / STACKS).unlink()
    names = (".model.partial", ".model.old", *(f"{name}.partial" for name in (METRICS, SAMPLES, "config.json")))
    manifests = (path / "manifest.json.partial" for path in list_checkpoints(run) if not path.is_symlink())
    partial = (*run.glob("checkpoints/.step-*.partial"), *run.glob(f"{STACKS}/rank-*.beat"))
    remove(aside, *(run / name for name in names), *partial, *manifests)


@contextlib.contextmanager
def locked(run: Path, world: World, say: Say) -> Iterator[None]:
    """One writer per run folder: a killed launcher's ranks may still be saving when the command is typed again."""
    world.barrier()  # all are there: where one failed at its start, no folder is made
    with contextlib.ExitStack() as stack:
        if world.rank == 0:
            with faults_of_writing(run):
                stack.enter_context(folders_above(run / "run"))  # a run that never began leaves no empty folder
                try:
                    # inside: the folder above may belong to somebody else
                    stack.enter_context(
                        folder_lock(
                            run / "run",
                            _LOCK_SECONDS,
                            on_wait=lambda: say(f"another process is still writing to {run}; waiting"),
                        )
                    )
                except TimeoutError:
                    raise EnvironmentFault(
                        f"another process is writing to {run}; wait for it, stop it, or use another --output-dir"
                    ) from None
                clear_leftovers(run)
        world.barrier()  # the others look at the folder only now
        yield


@contextlib.contextmanager
def watched(run: Path, world: World, stop_signal: Callable[[], int]) -> Iterator[Callable[[], int]]:
    """Yields `stop_signal` that also, on rank 0, returns FOLDER_GONE once `run` is there no more.

    Raises EnvironmentFault where another folder has its name.
    """
    if world.rank:
        yield stop_signal
        return
    own = os.open(run, os.O_RDONLY)  # held, so that its number goes to no other folder

    def stop_or_gone() -> int:
        try:
            if os.path.samestat(os.stat(run), os.fstat(own)):
                return stop_signal()
        except (FileNotFoundError, NotADirectoryError):
            return FOLDER_GONE
        except OSError:  # a network disk that does not answer
            return stop_signal()
        raise EnvironmentFault(
            f"{run} was deleted or moved while the run was writing to it, and another folder has its name now; move "
            "that away and the run's back, and run the same command to resume"
        )

    try:
        yield stop_or_gone
    finally:
        os.close(own)
