"""The command that starts a run again, from its settings."""

from __future__ import annotations

import dataclasses
import shlex

from wikift.settings.fields import TrainSettings
from wikift.settings.options import flag

# they start or show the run, no more
_OMITTED = ("resume", "config", "dry_run", "quiet", "wandb", "report_to", "workers")


def command_of(settings: TrainSettings, ranks: int) -> str:
    """The train command with these settings on `ranks` processes, defaults omitted; a shell takes it as it is."""
    options = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value is None or value == field.default or field.name in _OMITTED:
            continue
        if isinstance(value, bool):
            options.append(flag(field.name) if value else flag("no_" + field.name))
        else:
            for each in value if isinstance(value, tuple) else (value,):
                options += [flag(field.name), shlex.quote(f"{each:g}" if isinstance(each, float) else str(each))]
    program = f"torchrun --nproc_per_node={ranks} -m wikift train" if ranks > 1 else "wikift train"
    return " ".join([program, *options])
