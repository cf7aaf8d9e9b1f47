"""Weights & Biases, a view of metrics.jsonl. A resumed run continues there, a new one in its folder is new there."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wikift.base.errors import EnvironmentFault, one_line
from wikift.base.folders import WANDB_ID


class WandbRun:
    """A run of Weights & Biases that has started."""

    def __init__(self, started: Any) -> None:
        self.started = started

    def record(self, values: dict[str, Any]) -> None:
        self.started.log({k: v for k, v in values.items() if k != "step"}, step=values["step"])

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """A table of what the model wrote."""
        import wandb

        table = wandb.Table(columns=["step", "prompt", "text"], data=[list(row.values()) for row in rows])
        self.started.log({"samples": table}, step=step)


@contextlib.contextmanager
def open_wandb(run: Path, settings: dict[str, Any], quiet: bool) -> Iterator[WandbRun]:
    """Start or continue the folder's run. Raises EnvironmentFault where it does not start."""
    import wandb

    # its copy of the terminal would hold every frame of the live view
    chosen = wandb.Settings(console="off")
    if quiet:
        chosen.silent = True
    identity = run / WANDB_ID
    if not identity.exists():
        identity.write_text(uuid.uuid4().hex[:12])
    try:
        started = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "wikift"),
            name=os.environ.get("WANDB_NAME", run.name),
            id=identity.read_text().strip(),
            resume="allow",
            dir=run,
            config=settings,
            settings=chosen,
        )
    except Exception as error:
        raise EnvironmentFault(
            f"--wandb: Weights & Biases did not start ({one_line(error, 200)}); "
            "set WANDB_MODE=offline, run `wandb login`, or omit --wandb"
        ) from None
    code = 1
    try:
        yield WandbRun(started)
        code = 0
    finally:
        started.finish(exit_code=code)
