"""The folder that an export becomes: nothing that is not an export is overwritten, and it is complete or not there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wikift.base.errors import EnvironmentFault, UserError
from wikift.base.files import read_json
from wikift.base.names import EXPORT_RECORD
from wikift.base.publish import folder_lock, publish_folder
from wikift.base.signals import stopping_by_exception

FORMAT = "wikift-export-1"


def check_target(target: Path, identity: dict[str, Any], *, own: bool) -> None:
    """Raises UserError where `target` is something else than an export of this run; in its `own` hf/, any export."""
    if target.is_file():
        raise UserError(f"--out {target}: is a file; name a folder")
    if not target.exists() or not any(target.iterdir()):
        return
    record = read_json(target / EXPORT_RECORD)
    if record.get("format") != FORMAT or not isinstance(record.get("run"), dict):
        raise UserError(f"--out {target}: contains files that wikift did not export; name another folder, or move them")
    if record["run"] != identity and not own:
        name = record["run"].get("name")
        raise UserError(f"--out {target}: contains the model of another run ({name}); name another folder, or move it")


@contextlib.contextmanager
def published(target: Path) -> Iterator[Path]:
    """A folder to write into; it becomes `target` when all went well, and is removed otherwise."""

    def refuse() -> None:
        raise EnvironmentFault(f"{target}: another process is writing it; run the command again when that has ended")

    try:
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        with (
            stopping_by_exception(),
            folder_lock(target, on_wait=refuse),
            publish_folder(target, replace=True) as partial,
        ):
            yield partial
    except OSError as error:
        raise EnvironmentFault(
            f"{target} was not made: {error.strerror or error}; free space, or name another --out. An earlier "
            "export there is unchanged"
        ) from None
