"""Checkpoints of stock DeepSpeed and stock DCP to a Hugging Face directory. Run: pytest tests/test_peer.py"""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from tests.peer_folders import CONFIG, save_with_dcp, save_with_deepspeed
from tests.ranks import run_ranks
from tests.trained import text_store
from wikift.base.errors import UserError
from wikift.export.export import main

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the configuration and a tokenizer, no weights."""
    folder = tmp_path_factory.mktemp("model")
    text_store(folder / "store")
    shutil.copytree(folder / "store" / "tokenizer", folder / "model")
    GPT2Config(**CONFIG).save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def zero2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("zero") / "zero2"
    return folder, run_ranks(save_with_deepspeed, 2, folder, 2, "bf16", False)[0]


def assert_equal(folder: Path, masters: dict[str, Any]) -> None:
    """The directory holds these weights to the last bit, and stock classes load it."""
    held = load_file(folder / "model.safetensors")
    assert sorted(held) == sorted(masters)
    assert all(held[name].numpy().tobytes() == masters[name].tobytes() for name in masters)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.lm_head.weight.data_ptr() == loaded.transformer.wte.weight.data_ptr()
    assert AutoTokenizer.from_pretrained(folder)("The Renaissance")["input_ids"]
    assert (loaded.config.n_head, loaded.config.n_layer, loaded.config.vocab_size) == (2, 2, 97)


@pytest.mark.parametrize(
    ("stage", "precision", "ranks", "frozen"), [(1, "fp32", 2, False), (3, "bf16", 2, True), (3, "fp32", 3, False)]
)
def test_deepspeed_folders(tmp_path: Path, model: Path, stage: int, precision: str, ranks: int, frozen: bool) -> None:
    masters = run_ranks(save_with_deepspeed, ranks, tmp_path / "zero", stage, precision, frozen)[0]
    assert main([str(tmp_path / "zero"), "--model", str(model)]) == 0
    assert_equal(tmp_path / "zero" / "hf", masters)
    card = (tmp_path / "zero" / "hf" / "README.md").read_text()
    assert "global_step2" in card
    assert f"| ZeRO stage | {stage} |" in card


def test_needs_no_deepspeed_no_group_and_finds_the_config_above(
    zero2: tuple[Path, dict[str, Any]], model: Path, tmp_path: Path
) -> None:
    folder, masters = zero2
    shutil.copytree(folder, tmp_path / "run")
    for file in model.iterdir():
        shutil.copyfile(file, tmp_path / "run" / file.name)
    code = (
        "import sys; sys.modules['deepspeed'] = None; from wikift.export.export import main; "
        f"main([{str(tmp_path / 'run' / 'global_step2')!r}, '--out', {str(tmp_path / 'out')!r}, '--quiet']); "
        "import torch.distributed as d; assert not d.is_initialized() and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
    assert_equal(tmp_path / "out", masters)


@pytest.mark.parametrize(("prefix", "sharded"), [("", False), ("app.model", True)])
def test_dcp_folders(tmp_path: Path, model: Path, prefix: str, sharded: bool) -> None:
    masters = run_ranks(save_with_dcp, 2, tmp_path / "dcp", prefix, sharded)[0]
    out = tmp_path / "out"
    assert main([str(tmp_path / "dcp"), "--model", str(model), "--out", str(out)]) == 0
    assert_equal(out, masters)
    (file,) = list((tmp_path / "dcp").glob("__0_0.distcp"))
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(UserError, match=r"\.distcp: cannot be read"):
        main([str(tmp_path / "dcp"), "--model", str(model), "--out", str(out)])
    assert_equal(out, masters)  # the one before stands


def problem(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        main(list(words))
    assert len(caught.value.problems) == 1
    return caught.value.problems[0]


def test_damaged_and_foreign_folders(zero2: tuple[Path, dict[str, Any]], model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "zero"
    shutil.copytree(zero2[0], folder, ignore=shutil.ignore_patterns("hf"))
    words = (str(folder), "--model", str(model))
    assert "--model NAME|PATH" in problem(str(folder))
    assert "--best" in problem(*words, "--best")
    assert "has no global_step7" in problem(*words, "--step", "7")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({**GPT2Config(**CONFIG).to_dict(), "n_layer": 3}))
    assert "n_layer is 3, the weights have 2" in problem(str(folder), "--model", str(other))
    (other / "config.json").write_text(json.dumps(GPT2Config(**CONFIG).to_dict()))
    assert "has no tokenizer" in problem(str(folder), "--model", str(other))
    (folder / "latest").write_text("global_step9")
    assert "names 'global_step9'" in problem(*words)
    (folder / "latest").write_text("global_step2")
    share = folder / "global_step2" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = share.read_bytes()
    share.write_bytes(content[: len(content) // 2])
    assert "it is damaged" in problem(*words)
    share.unlink()
    assert "2 ranks wrote it" in problem(*words)
    assert not (folder / "hf").exists()


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('ran')",)


def test_no_code_of_a_checkpoint_runs(zero2: tuple[Path, dict[str, Any]], model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "zero"
    shutil.copytree(zero2[0], folder, ignore=shutil.ignore_patterns("hf"))
    torch.save({"client": Evil()}, folder / "global_step2" / "mp_rank_00_model_states.pt")
    assert "holds builtins.exec" in problem(str(folder), "--model", str(model))
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(Evil()))
    assert "holds builtins.exec" in problem(str(tmp_path / "dcp"), "--model", str(model))
