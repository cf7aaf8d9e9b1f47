"""The package as a user installs it: a wheel in a bare environment, outside the checkout, does the whole job.

pytest -m long tests/test_wheel.py      needs a package index
"""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TRAIN = (
    "--data store --from-scratch --config-overrides n_layer=1,n_head=2,n_embd=32 --block-size 32 --global-batch-size 4 "
    "--max-steps 4 --device cpu"
)


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_every_package_is_listed() -> None:
    listed = setup_cfg()["options"]["packages"].split()
    folders = {str(path.parent.relative_to(ROOT)).replace("/", ".") for path in ROOT.glob("wikift/**/__init__.py")}
    assert listed == sorted({*folders, "wikift.ds_configs"})


def test_what_is_asked_for_and_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from wikift.settings.deepspeed import importlib, merge
    from wikift.settings.fields import TrainSettings

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (problem,) = merge(TrainSettings(deepspeed="zero2"), {}).problems
    assert problem == (
        '--deepspeed zero2: DeepSpeed is not installed; pip install "wikift[deepspeed]", or use --engine fsdp'
    )


@pytest.mark.long
def test_the_wheel_does_the_whole_job(tmp_path: Path) -> None:
    source, work = tmp_path / "source", tmp_path / "work"
    source.mkdir()  # the build leaves a folder behind
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("wikift", "ds_configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    work.mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {"OMP_NUM_THREADS": "1"}

    def run(*words: str, code: int = 0) -> str:
        done = subprocess.run(words, cwd=work, env=environment, capture_output=True, text=True, timeout=1200)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(source))
    (wheel,) = tmp_path.glob("wikift-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    own = {path.name for path in (ROOT / "ds_configs").glob("*.json")}
    assert {Path(name).name for name in names if name.startswith("wikift/ds_configs/") and name.endswith("json")} == own
    assert "wikift/py.typed" in names
    shown = {path.name for path in (ROOT / "wikift" / "watch").iterdir() if path.suffix not in ("", ".py")}
    assert {f"wikift/watch/{name}" for name in shown} <= set(names)
    assert not [name for name in names if name.startswith(("tests", "launch", "benchmarks"))]
    run(sys.executable, "-m", "venv", "venv")
    bin = str(work / "venv" / "bin")
    run(f"{bin}/python", "-m", "pip", "install", "--quiet", "-c", str(ROOT / "requirements.txt"), str(wheel))

    assert run(f"{bin}/wikift", "--version") == run(f"{bin}/python", "-m", "wikift", "--version")
    said = run(f"{bin}/wikift", "prepare", "--dataset", "demo", "--tokenizer", "train:300", "--out", "store")
    assert "\n  wikift train --data store --from-scratch\n" in said
    said = run(f"{bin}/wikift", "train", *TRAIN.split(), "--output-dir", "one")
    assert "\n  wikift consolidate one\n" in said
    torchrun = [f"{bin}/torchrun", "--standalone", "--nproc_per_node=2", "-m", "wikift", "train"]
    said = run(*torchrun, *TRAIN.split(), "--output-dir", "two")
    assert "\n  python -m wikift consolidate two\n" in said
    said = run(f"{bin}/wikift", "train", *TRAIN.split(), "--deepspeed", "zero2", code=2)
    assert 'DeepSpeed is not installed; pip install "wikift[deepspeed]"' in said  # found the file, not the library
    assert len(said.splitlines()) == 2
    assert "wikift evaluate two/hf" in run(f"{bin}/wikift", "consolidate", "two")
    assert "perplexity" in run(f"{bin}/wikift", "evaluate", "two/hf", "--split", "test", "--protocol", "blocks")
    said = run(f"{bin}/python", "-m", "wikift", "generate", "two/hf", "--prompt", "The", "--max-new-tokens", "4")
    assert "The" in said
    assert run(f"{bin}/wikift", "report", "two") == "report: two/report.html\n"
    assert run(f"{bin}/python", "-c", "import wikift; print(wikift.generate('two/hf', 'The', max_new_tokens=4))")
