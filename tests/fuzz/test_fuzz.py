"""Files changed at random, read by what reads them: a message, and no traceback, hang, memory by the gigabyte or code.

pytest tests/fuzz, or `make fuzz` for a million cases. What was found is kept: as an example here, or in found/.
"""

from __future__ import annotations

import contextlib
import copy
import gzip
import io
import itertools
import json
import os
import re
import resource
import shutil
import signal
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.tiny import tiny_store
from tests.trained import SENTENCES, text_store, trained_run
from wikift.base.errors import EnvironmentFault, UserError
from wikift.base.files import read_lines
from wikift.base.folders import check_model, newest_run, train_command
from wikift.base.model_files import open_model
from wikift.checkpoint.reader import open_checkpoint
from wikift.commands.compare import main as compare
from wikift.commands.consolidate import main as consolidate
from wikift.commands.evaluate import main as evaluate
from wikift.commands.report import main as report
from wikift.commands.runs import main as runs
from wikift.commands.session import set_value
from wikift.data.sources import Source, open_source
from wikift.data.store import open_store
from wikift.data.tokenizer import load_tokenizer
from wikift.evaluation.text import text_of_store
from wikift.model.gpt2 import load_config, load_generation_config
from wikift.settings import deepspeed
from wikift.settings.checks import check_train
from wikift.settings.fields import PrepareSettings, TrainSettings
from wikift.settings.options import parse_all
from wikift.settings.resolve import resolve
from wikift.settings.run_fields import EvaluateSettings, GenerateSettings
from wikift.watch.metrics import keep_until
from wikift.watch.record import read_metrics

CASES = int(os.environ.get("FUZZ_CASES", "600"))
SECONDS, BYTES = 60, 3 << 30  # of one case, at most

PIECES = [
    b"", b"\0", b"\xff\xfe", b"\x1b[2J", b'"', b"\n", b"[" * 5000, b'{"a":' * 3000, b"9" * 5000, b"1e999", b"-1",
    b"null", b"true", b"NaN", b"0.5", b"../../x", b"/etc/passwd", b"x" * 300, b"\xed\xa0\x80", b"{}", b"[]", b"{", b"]",
    b"\\ud800", b"\x80\x04\x95", b"&a", b"*a", b"!!python/object/apply:os.system ['true']", b"\x85",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 2, 1.5, 10**400, 2**63, -(2**63), float("nan"), float("inf"), "", "x", "\0", "../x",
    "/x", "x" * 300, "\x1b[2J", "\ud800", [], {}, [[1]], [None], {"a": None}, {"": {}}, ["../x"], "9" * 5000,
]  # fmt: skip


def changed(data: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    for position, cut, piece in edits:
        at = position % (len(data) + 1)
        data = data[:at] + piece + data[at + cut :]
    return data


def nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything in a JSON value."""
    for key in range(len(value)) if isinstance(value, list) else list(value) if isinstance(value, dict) else ():
        yield value, key
        yield from nodes(value[key])


def replaced(data: bytes, changes: list[tuple[int, Any]]) -> bytes:
    """JSON with some of its values replaced."""
    content = json.loads(data)
    for number, value in changes:
        if every := list(nodes(content)):
            container, key = every[number % len(every)]
            container[key] = copy.deepcopy(value)
    return json.dumps(content).encode()


EDITS = st.lists(
    st.tuples(st.integers(0, 10**6), st.integers(0, 40), st.sampled_from(PIECES) | st.binary(max_size=4)), min_size=1,
    max_size=4,
)  # fmt: skip
CHANGES = st.lists(st.tuples(st.integers(0, 10**4), st.sampled_from(VALUES)), min_size=1, max_size=3)


class Target(NamedTuple):
    """A file in a folder, and what reads it there."""

    file: str
    read: Callable[[Path], object]
    content: bytes | None = None  # None: the one that is there


def rows(path: Path) -> None:
    corpus = open_source(Source(str(path)))
    for split in corpus.splits:
        for _ in corpus.texts(split):
            pass


def settings_of(path: Path) -> None:
    parsed = parse_all(TrainSettings, ["--config", str(path)])
    parsed.refuse(check_train(resolve(parsed.settings, 1), 1, launched=False))


def command_lines(path: Path) -> None:
    """Every line an argument."""
    arguments = path.read_bytes().decode("utf-8", "surrogateescape").split("\n")
    for each in (PrepareSettings, TrainSettings, EvaluateSettings, GenerateSettings):
        with contextlib.suppress(UserError, SystemExit):
            parse_all(each, arguments).refuse(())
    for first, second in itertools.pairwise(arguments):
        with contextlib.suppress(UserError):
            set_value(GenerateSettings(), first, second)


def exported(path: Path) -> None:
    run = next(folder for folder in path.parents if folder.name == "run")
    train_command(run)
    newest_run(run.parent)
    check_model(str(run))
    for view in (
        runs,
        lambda line: report([*line, "--text"]),
        lambda line: compare([*line, str(run.parent / "other")]),
    ):
        with contextlib.suppress(UserError):
            view([str(run)])
    consolidate([str(run), "--quiet"])


def metrics(path: Path) -> None:
    read_metrics(path)
    keep_until(path, 8)
    exported(path)


def tokenizer(path: Path) -> None:
    load_tokenizer(str(path.parent), path.parent.with_name("copy"))


def model(path: Path) -> None:
    open_model(str(path.parent))
    load_generation_config(str(path.parent), load_config(str(path.parent)))


def packed(name: str, text: bytes = "".join(SENTENCES).encode()) -> bytes:
    file = io.BytesIO()
    if name.endswith(".zip"):
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("../../train.txt", text)
    else:
        with tarfile.open(fileobj=file, mode="w") as tar:
            entry = tarfile.TarInfo("../../train.txt")
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text))
    return file.getvalue()


CARD = b"""---
configs:
- config_name: x
  default: true
  data_dir: .
  data_files:
  - split: train
    path: [a*, b]
---
"""
TOML = b'max_steps = 5\nmodel = "gpt2"\nlearning_rate = 1e-3\ndataset = ["demo"]\n'
ZERO = b'{"zero_optimization": {"stage": 2, "overlap_comm": true}, "optimizer": {"type": "Adam", "params": {"lr": 1}}}'
LINE = b"--seed\n5\n--stop=x\ntop_k\n3\n--prompt\nx\n--dataset\nd\ny\n--workers\n2"
MANIFEST = "run/checkpoints/step-00000012/manifest.json"
TARGETS = {
    "config.toml": Target("a.toml", settings_of, TOML),
    "config.json": Target("a.json", settings_of, b'{"max_steps": 5, "warmup-steps": 0.1, "wandb": false, "data": "d"}'),
    "arguments": Target("a", command_lines, LINE),
    "ds_config": Target("a.json", deepspeed.read, ZERO),
    "store.json": Target("store/store.json", lambda path: text_of_store(open_store(path.parent))),
    "card": Target("README.md", lambda path: rows(path.parent), CARD),
    "text": Target("a.txt", rows, "".join(SENTENCES).encode()),
    "json": Target("a.json", rows, b'{"rows": [{"text": "a b"}, {"text": "c", "n": {"m": 1}}]}'),
    "jsonl": Target("a.jsonl", rows, b'{"text": "a b"}\n{"text": "c", "n": {"m": 1}}\n'),
    "csv": Target("a.csv", rows, b'id,text\n1,"a ""b"""\n2,c\n'),
    "gzip": Target("a.txt.gz", rows, gzip.compress("".join(SENTENCES).encode(), mtime=0)),
    "zip": Target("a.zip", rows, packed(".zip")),
    "tar": Target("a.tar", rows, packed(".tar")),
    "prompts": Target("a", lambda path: read_lines(path, "--prompts-file"), b"a prompt\nanother\n"),
    "weights": Target("model/model.safetensors", model),
    "model": Target("model/config.json", model),
    "generation": Target("model/generation_config.json", model),
    "tokenizer.json": Target("model/tokenizer.json", tokenizer),
    "tokenizer_config.json": Target("model/tokenizer_config.json", tokenizer),
    "metrics": Target("run/metrics.jsonl", metrics),
    "evaluations": Target("run/evaluations.jsonl", exported),
    "run": Target("run/config.json", exported),
    "run's model": Target("run/model/config.json", exported),
    "manifest": Target(MANIFEST, lambda path: open_checkpoint(path.parent)),
    "export": Target("run/hf/wikift.json", exported),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    run = trained_run(folder / "run", text_store(folder / "text").path)
    consolidate([str(run), "--quiet"])
    shutil.copytree(run / "hf", folder / "model")
    evaluate([str(run), "--data", str(folder / "text"), "--device", "cpu"])
    shutil.copytree(run, folder / "other")
    tiny_store(folder / "store")
    (run / "model" / "wikift.json").unlink()  # checksums would refuse all of the changes
    record = folder / "store" / "store.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"sha256": ""}))
    return folder


watching = False


def watch_for_code(event: str, arguments: tuple[Any, ...]) -> None:
    """Fails where what is read becomes code. An import compiles and executes too, and type hints are compiled."""
    if not watching or event not in ("exec", "compile", "pickle.find_class", "os.system", "subprocess.Popen"):
        return
    frame = sys._getframe(1)
    while frame is not None and not re.search(r"importlib|/typing\.py$", frame.f_code.co_filename):
        frame = frame.f_back  # type: ignore[assignment]
    shell = event == "subprocess.Popen" and Path(str(arguments[0])).name in ("sh", "bash", "dash")
    if (frame is None and event != "subprocess.Popen") or shell:
        raise AssertionError(f"{event}: {arguments}")


sys.addaudithook(watch_for_code)


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """No code, no hang, no memory by the gigabyte."""
    global watching

    def late(number: int, frame: object) -> None:
        raise AssertionError(f"takes more than {SECONDS} s")

    used = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10  # type: ignore[index]
    limits, before = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, limits[1]))
    signal.alarm(SECONDS)
    watching = True
    try:
        yield
    finally:
        watching = False
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize("name", TARGETS)
@settings(
    max_examples=max(1, CASES // len(TARGETS)), deadline=None, suppress_health_check=list(HealthCheck),
    derandomize="FUZZ_CASES" not in os.environ,
)  # fmt: skip
@given(edits=EDITS, changes=st.none() | CHANGES)
@example(edits=[(6814, 1, b"1e999")], changes=None)  # found in a ds_config
@example(edits=[], changes=[(0, "\ud800")])  # found in tokenizer_config.json
def test_no_file_crashes_its_reader(
    folder: Path, name: str, edits: list[tuple[int, int, bytes]], changes: list[tuple[int, Any]] | None
) -> None:
    target = TARGETS[name]
    path = folder / target.file if target.content is None else folder / "own" / target.file
    path.parent.mkdir(exist_ok=True)
    content = path.read_bytes() if target.content is None else target.content
    try:
        data = replaced(content, changes) if changes and path.suffix == ".json" else changed(content, edits)
        path.write_bytes(data)
        try:
            with bounded():
                target.read(path)
        except (UserError, EnvironmentFault):
            pass
    finally:
        path.write_bytes(content)
        if target.content is not None:
            path.unlink()
