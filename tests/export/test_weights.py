"""The weights of an export, from checkpoints made by hand. Run: pytest tests/export/test_weights.py"""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.real import ROOT
from wikift.base import tensorfile
from wikift.base.world import World
from wikift.checkpoint.fragment import OPTIMIZER, SCALARS, STATES, Fragment
from wikift.checkpoint.writer import Saver
from wikift.commands.consolidate import main

# VmHWM, for ru_maxrss would begin at the size of the process that this one was forked from
_MEASURE = """
import re, sys
from pathlib import Path
import torch
from wikift.settings.run_fields import ConsolidateSettings
from wikift.commands import consolidate
def peak_kb():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
before = peak_kb()
consolidate.run(ConsolidateSettings(run=sys.argv[1]))
print(peak_kb() - before, "transformers" in sys.modules)
"""


def save_checkpoint(run: Path, parameters: dict[str, list[int]], *, tied: bool = True) -> None:
    """One more checkpoint of `run`, of step 99, with random weights of these shapes."""
    data = torch.randn(max(math.prod(shape) for shape in parameters.values()))

    def fragments() -> Any:
        for name, shape in parameters.items():
            for state in STATES:
                yield Fragment(name, state, 0, tuple(shape), data[: math.prod(shape)])
        for name in SCALARS:
            yield Fragment(OPTIMIZER, name, 0, (1,), torch.zeros(1))

    about = {"tokens": 1, "eval_loss": None, "model_config": {"tie_word_embeddings": tied}}
    Saver(run, World(), keep=9, aside=False).save(fragments(), 99, about, parameters)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_left_out(run: Path, tied: bool) -> None:
    parameters = {"transformer.wte.weight": [6, 4], "transformer.ln_f.weight": [4], "lm_head.weight": [6, 4]}
    save_checkpoint(run, parameters, tied=tied)
    assert main([str(run)]) == 0
    names, metadata = tensorfile.read_header(run / "hf" / "model.safetensors")
    assert ("lm_head.weight" in names) is not tied
    assert len(names) == 3 - tied
    assert metadata == {"format": "pt"}


def test_memory_is_one_tensor(run: Path) -> None:
    """101 MB of weights of which the largest tensor is 33 MB."""
    parameters = {"transformer.wte.weight": [8192, 1024]}
    parameters |= {f"transformer.h.{i}.mlp.c_fc.weight": [1024, 4096] for i in range(4)}
    save_checkpoint(run, parameters)
    command = [sys.executable, "-c", _MEASURE, str(run)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    growth, imported = done.stdout.splitlines()[-1].split()
    assert int(growth) < 8192 * 1024 * 4 // 1024 + 16 * 1024, "16 MB for the buffers of files"
    assert imported == "False"
