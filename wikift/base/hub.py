"""The Hugging Face Hub and its libraries: is a word a name there, can it be reached, and what to say when not."""

from __future__ import annotations

import errno
import importlib
import os
import re
import socket
import sys
import urllib.parse
import urllib.request

from wikift.base.errors import EnvironmentFault, UserError
from wikift.base.errors import one_line as one_line

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_CONNECT_SECONDS = 5.0


def is_name(word: str) -> bool:
    """Whether `word` could be NAME or OWNER/NAME of the Hub."""
    return bool(_NAME.fullmatch(word))


def offline_if_unreachable() -> bool:
    """Where the Hub does not answer, use the cache alone, as with `HF_HUB_OFFLINE=1`. Returns whether it is offline.

    Without it the libraries try for 25 to 50 seconds and print a line for every attempt, even where all is cached.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return True
    address = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    host = address.hostname or "huggingface.co"
    if urllib.request.getproxies() and not urllib.request.proxy_bypass(host):
        return False  # only the proxy knows
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()
        return False
    except OSError:
        pass
    os.environ["HF_HUB_OFFLINE"] = "1"  # for what is imported from now on; the rest has read it already
    for module, name in (("huggingface_hub.constants", "HF_HUB_OFFLINE"), ("datasets.config", "HF_HUB_OFFLINE")):
        if module in sys.modules:
            setattr(sys.modules[module], name, True)
    return True


def quiet_libraries() -> None:
    """Silence what transformers and datasets, where they are loaded, would print about their own work."""
    for library in ("transformers", "datasets"):
        if library in sys.modules:
            importlib.import_module(f"{library}.utils.logging").set_verbosity_error()
    if "transformers" in sys.modules:
        importlib.import_module("transformers.utils.logging").disable_progress_bar()


def failure(error: Exception, setting: str, instead: str) -> Exception:
    """What to raise for what a Hub library raised: a wrong name is the user's, all else the environment's."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    kinds = {kind.__name__ for link in chain for kind in type(link).__mro__}
    if kinds & {"GatedRepoError"}:
        return UserError(
            f"{setting}: the Hub gives it to some users only; log in with `hf auth login`, or name {instead}"
        )
    if kinds & {"RepositoryNotFoundError", "DatasetNotFoundError", "HFValidationError"} and not kinds & {
        "OfflineModeIsEnabled"
    }:
        return UserError(f"{setting}: the Hub has none of that name; fix the name, or name {instead}")
    if any(isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT) for link in chain):
        return EnvironmentFault(f"{setting}: the disk with the Hugging Face cache is full; free space or set HF_HOME")
    return EnvironmentFault(
        f"{setting}: is neither in the Hugging Face cache nor to be had from the Hub ({one_line(error)}). "
        f"Connect to the network and run the command again, or name {instead}. Nothing was written."
    )


def as_os_error(error: Exception) -> Exception:
    """Rust libraries put the number of a system's error into a text; give it back its class."""
    match = re.search(r"os error (\d+)", str(error))
    return OSError(int(match[1]), os.strerror(int(match[1]))) if match else error


def no_progress_bars() -> None:
    """Let the Hub's libraries, where they are imported from now on, show none unless the user's environment does."""
    for library in ("HF_HUB", "HF_DATASETS"):
        os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")


def keep_tokenizers_to_one_thread() -> None:
    """Threads of our own call it. Also, where it was never told the library warns about every later fork."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
