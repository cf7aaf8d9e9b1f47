"""The Hugging Face Hub: NAME or NAME@REVISION to a folder of its cache, each file fetched once; what to say if not.

`fetch` alone asks the Hub; everything else reads the folder that it returns. The first process of each host fetches
(`world.first_on_each_host`), the others read its cache. Where the Hub cannot be asked, a copy in the cache is used.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import functools
import importlib
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wikift.base.console import Progress, print
from wikift.base.errors import EnvironmentFault, UserError, one_line, without_password
from wikift.base.launcher import launch

CONFIG = ("config.json", "generation_config.json")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
TOKENIZER = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "chat_template.jinja", "vocab.txt", "*.model", "additional_chat_templates/*",
)  # fmt: skip
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(@[\w.][\w./-]*)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ANSWER_SECONDS = (3.0, 10.0)  # for the Hub's first answer; the second where the cache has no copy
_CHUNK_BYTES = 1 << 16
_SHOWN_BYTES = 10_000_000  # of a file whose download is shown

commits: dict[str, str] = {}  # by NAME[@REVISION], a dataset's as datasets/NAME: what this process reads
_silent: list[Exception] = []  # why the Hub is not asked again


def is_name(word: str) -> bool:
    """Whether `word` could be NAME, OWNER/NAME or one of them @REVISION on the Hub."""
    return bool(_NAME.fullmatch(word))


def fetch(name: str, setting: str, files: tuple[str, ...], kind: str = "model") -> Path:
    """The folder with `files` (patterns) of repository `name`; a folder's name is returned as it is.

    All calls of a process read the same commit. Raises UserError or EnvironmentFault, see `failure`.
    """
    if kind == "model" and Path(name).is_dir():
        return Path(name)
    repository, _, revision = name.partition("@")
    key = name if kind == "model" else f"{kind}s/{name}"
    wanted = (repository, kind, commits.get(key) or revision or "main", files)
    cached_first = _COMMIT.fullmatch(wanted[2]) or _silent or launch().local_rank
    folder = (cached_first and _cached(*wanted)) or _asked(wanted, f"{setting} {name}")
    commits[key] = folder.name
    return folder


def _asked(wanted: tuple[str, str, str, tuple[str, ...]], where: str) -> Path:
    for last, seconds in enumerate(_ANSWER_SECONDS):
        try:
            return _downloaded(*wanted, seconds)
        except Exception as error:  # of huggingface_hub, its HTTP client and the file system
            kinds = _kinds(error)
            lost = (status_of(error) or 0) >= 500 or "TransportError" in kinds
            if (folder := _cached(*wanted)) is not None:
                if not _silent and "OfflineModeIsEnabled" not in kinds:
                    tell(f"{where}: {reason_of(error)}; using the copy in the cache, commit {folder.name[:8]}")
                if lost:
                    _silent[:] = [error]
                return folder
            if last or _silent or not lost or "ConnectError" in kinds:
                raise failure(error, where, "a folder") from None
            time.sleep(1)
    raise AssertionError


def _downloaded(repository: str, kind: str, revision: str, files: tuple[str, ...], seconds: float) -> Path:
    if _silent:
        raise _silent[0]
    hub = library()
    about = hub.HfApi().repo_info(repository, repo_type=kind, revision=revision, timeout=seconds, files_metadata=True)
    for file in about.siblings:
        if (file.size or 0) >= _SHOWN_BYTES and any(fnmatch.fnmatchcase(file.rfilename, each) for each in files):
            shown = type("Shown", (Shown,), {"name": f"{repository}/{file.rfilename}"})
            hub.hf_hub_download(
                repository, file.rfilename, repo_type=kind, revision=about.sha, tqdm_class=shown, etag_timeout=seconds
            )
    folder = Path(
        hub.snapshot_download(
            repository, repo_type=kind, revision=about.sha, allow_patterns=list(files), etag_timeout=seconds
        )
    )
    if revision != about.sha:  # where the cache is asked for this branch or tag, later or by another process
        reference = folder.parents[1] / "refs" / revision
        with contextlib.suppress(OSError):  # a cache that cannot be written
            reference.parent.mkdir(parents=True, exist_ok=True)
            reference.write_text(about.sha)
    return folder


def _cached(repository: str, kind: str, revision: str, files: tuple[str, ...]) -> Path | None:
    """The cache's folder, None where it lacks one of `files` (or, as older libraries filled it, all of them)."""
    try:
        folder = Path(
            library().snapshot_download(
                repository, repo_type=kind, revision=revision, allow_patterns=list(files), local_files_only=True
            )
        )
    except Exception:  # of its own, and for names that are none
        return None
    return folder if any(any(folder.glob(pattern)) for pattern in files) else None


# --- huggingface_hub: silent, never waiting for ever, resuming after a reset, showing downloads --------------------


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


# --- what to say -------------------------------------------------------------------------------------------------


def failure(error: Exception, setting: str, instead: str) -> Exception:
    """What to raise for what a Hub library raised: a wrong name is the user's, all else the environment's."""
    kinds, (_, _, name) = _kinds(error), setting.partition(" ")
    reason = reason_of(error)
    if "OfflineModeIsEnabled" not in kinds:
        kind = "datasets/" if setting.startswith("--dataset") else ""
        page = f"{os.environ.get('HF_ENDPOINT') or 'https://huggingface.co'}/{kind}{name.partition('@')[0]}"
        page = without_password(page)
        if "GatedRepoError" in kinds:
            return UserError(f"{setting}: is gated; ask for access at {page}, then log in: hf auth login")
        if "RevisionNotFoundError" in kinds:
            return UserError(f"{setting}: has no such branch, tag or commit; correct what follows @, or the revision")
        if kinds & {"RepositoryNotFoundError", "HFValidationError"}:
            return UserError(f"{setting}: is not there, or private: set HF_TOKEN, correct the name, or name {instead}")
        if status_of(error) in (401, 403):
            return UserError(f"{setting}: the Hub refuses the token; renew it with hf auth login, or correct HF_TOKEN")
    if "is full" in reason:
        return EnvironmentFault(f"{setting}: {reason}; free space, or set HF_HOME to another disk")
    fix = "unset it" if "OfflineModeIsEnabled" in kinds else "try again later"
    return EnvironmentFault(f"{setting}: {reason}, and the Hugging Face cache has no copy; {fix}, or name {instead}")


def reason_of(error: Exception) -> str:
    kinds, status = _kinds(error), status_of(error)
    if any(isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT) for link in _chain(error)):
        return "the disk with the Hugging Face cache is full"
    if "OfflineModeIsEnabled" in kinds:
        return "HF_HUB_OFFLINE is set"
    if status:
        return f"the Hub answers {status}"
    if kinds & {"TimeoutException", "TimeoutError"}:
        return "the Hub does not answer"
    if kinds & {"ConnectError", "ConnectionError"}:
        return "the Hub cannot be reached"
    return f"the Hub cannot be read ({one_line(error)})"


def _chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    return chain


def _kinds(error: BaseException) -> set[str]:
    return {kind.__name__ for link in _chain(error) for kind in type(link).__mro__}


def status_of(error: BaseException) -> int | None:
    codes = (getattr(getattr(link, "response", None), "status_code", None) for link in _chain(error))
    return next((int(code) for code in codes if code), None)


def as_os_error(error: Exception) -> Exception:
    """Rust libraries put the number of a system's error into a text; give it back its class."""
    match = re.search(r"os error (\d+)", str(error))
    return OSError(int(match[1]), os.strerror(int(match[1]))) if match else error


def quiet_libraries() -> None:
    """Silence what transformers, where it is loaded, would print about its own work."""
    if "transformers" in sys.modules:
        importlib.import_module("transformers.utils.logging").set_verbosity_error()
        importlib.import_module("transformers.utils.logging").disable_progress_bar()


def keep_tokenizers_to_one_thread() -> None:
    """Threads of our own call it. Also, where it was never told the library warns about every later fork."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
