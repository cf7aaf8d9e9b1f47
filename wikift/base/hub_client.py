"""huggingface_hub as wikift uses it: silent, never waiting for ever, resuming after a reset, showing downloads."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from wikift.base.console import Progress, print
from wikift.base.errors import one_line
from wikift.base.launcher import launch

_CHUNK_BYTES = 1 << 16


@functools.cache
def library() -> Any:
    """huggingface_hub: without words of its own, and resuming a file where the connection broke."""
    import huggingface_hub
    from huggingface_hub.utils import _http

    def client() -> Any:
        made = _http.default_client_factory()
        made.timeout = 60.0  # for requests that state none; the default is to wait for ever
        made.event_hooks["response"].append(_resumed_after_reset)
        return made

    huggingface_hub.set_client_factory(client)
    huggingface_hub.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():  # about the user's HF_HUB_DISABLE_PROGRESS_BARS=0
        warnings.simplefilter("ignore")
        huggingface_hub.utils.disable_progress_bars()  # type: ignore[attr-defined]
    return huggingface_hub


def _resumed_after_reset(response: Any) -> None:
    """huggingface_hub continues a file after a timeout, but not after a reset: let it take that for one."""
    read, errors = response.iter_bytes, sys.modules[type(response).__module__.partition(".")[0]]

    def iter_bytes(chunk_size: int | None = None) -> Iterator[bytes]:
        try:
            yield from read(_CHUNK_BYTES)  # what is left of a larger chunk would be lost
        except errors.NetworkError as error:
            tell(f"the connection to the Hub broke ({one_line(error)}), resuming")
            raise errors.ReadTimeout(str(error)) from None

    response.iter_bytes = iter_bytes


class Shown:
    """What huggingface_hub takes for a progress bar: one line on a terminal, lines in a pipe, of rank 0 alone."""

    name = ""

    def __init__(self, *_: Any, total: float | None = None, initial: int = 0, **options: Any) -> None:
        self.total, self.n = int(total or 0), initial
        self.progress = Progress(quiet=not speaks())
        self.progress.show(f"downloading {self.name}, {self.total / 1e6:,.1f} MB")

    def __enter__(self) -> Shown:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def update(self, count: float | None = 1) -> None:
        self.n += int(count or 0)
        self.progress.fraction(f"downloading {self.name}", self.n / max(self.total, 1))

    def close(self) -> None:
        self.progress.clear()

    def update_transfer(self, *_: Any) -> None: ...  # of bytes on the line, which Xet counts apart

    def set_postfix_str(self, *_: Any, **options: Any) -> None: ...


def speaks() -> bool:
    return launch().rank == 0 and os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "0") in ("", "0")


def tell(text: str) -> None:
    if speaks():
        print(f"wikift: {text}", file=sys.stderr, flush=True)


def be_quiet() -> None:
    """No downloads are shown in this process, as where the user's environment says so."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
