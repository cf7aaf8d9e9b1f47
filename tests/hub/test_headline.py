"""The commands of the README with nothing prepared and nothing cached. Run: pytest tests/hub/test_headline.py"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.hub.conftest import GPT2, WIKI
from tests.hub_server import HubServer

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
TRAIN = "torchrun --nproc_per_node=4 launch/train.py"


def typed(server: HubServer, line: str, home: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """What a user gets who types `line` in a checkout."""
    for name in ("launch", "ds_configs", "wikift"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    environment = server.environment(home, PATH=f"{BIN}:/usr/bin:/bin", PYTHONWARNINGS="default", PYTHONPATH=str(ROOT))
    return subprocess.run(
        line, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=280,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.mark.parametrize(
    "line",
    [
        "python launch/train.py",
        pytest.param(TRAIN, marks=pytest.mark.long),
        pytest.param("deepspeed launch/train.py --deepspeed ds_configs/zero2.json", marks=pytest.mark.long),
        pytest.param("python launch/generate.py", marks=pytest.mark.long),
    ],
)
def test_with_nothing_but_the_hub(server: HubServer, home: Path, tmp_path: Path, line: str) -> None:
    done = typed(server, line, home, tmp_path)
    assert done.returncode == 0, done.stderr
    config = "wikitext-103-v1" if line == TRAIN else "wikitext-2-v1"
    run = tmp_path / "runs" / f"gpt2-{config}"
    sent = Counter(r["path"].rpartition("/")[2] for r in server.requests if r["method"] == "GET" and r["body"])
    names = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
             *(f"{split}-00000-of-00001.parquet" for split in ("train", "validation", "test"))]  # fmt: skip
    assert sent == dict.fromkeys([*names, "README.md"], 1)
    record = json.loads((run / "config.json").read_text())
    commits = {name: server.repositories[name].revision("main")[0] for name in (GPT2, WIKI)}
    assert record["commits"]["gpt2"] == record["store"]["tokenizer"]["commit"] == commits[GPT2]
    assert record["store"]["revision"] == commits[WIKI]
    assert f"{sum(1 for _ in (run / 'checkpoints').iterdir())}" in "12"
    if "generate" in line:
        assert "36,736 parameters" in done.stdout + done.stderr
