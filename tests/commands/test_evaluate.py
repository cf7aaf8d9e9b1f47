"""wikift evaluate, from the command line to its output. Run: pytest tests/commands/test_evaluate.py"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.trained import text_store, trained_run
from wikift.base.errors import UserError
from wikift.commands.evaluate import main, run
from wikift.data.store import TokenStore
from wikift.model.gpt2 import load_model
from wikift.settings.run_fields import EvaluateSettings

FREE = ("README.md", "generation_config.json", "wikift.json")  # nothing that is computed depends on these
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[TokenStore, Path]:
    """A store and a run of 12 steps with positions for 32 tokens, exported to RUN/hf by the first that asks."""
    folder = tmp_path_factory.mktemp("evaluate")
    store = text_store(folder / "store")
    return store, trained_run(folder / "runs" / "small", store.path)


def exported(run: Path) -> Path:
    if not (run / "hf").exists():
        from wikift.commands.consolidate import main as consolidate

        assert consolidate([str(run), "--quiet"]) == 0
    return run / "hf"


def test_a_run_is_exported_and_scored_on_its_own_store(
    made: tuple[TokenStore, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    store, _ = made
    run = trained_run(tmp_path / "runs" / "new", store.path, max_steps=4)
    assert main([str(run), "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert (run / "hf" / "model.safetensors").is_file()
    assert "step 4" in err
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[2] == "split protocol context stride normaliser tokens words perplexity"
    tokens = store.splits["validation"].tokens
    unscored = math.ceil(tokens / 32)  # each block's first token
    assert lines[3].startswith(f"validation blocks 32* 32* tokens {tokens - unscored} 74 ")
    assert any(line.startswith("test knn 32* 16* words ") for line in lines)
    assert any("*: windows scaled" in line for line in lines)
    assert any("need the text" in line and "--dataset" in line for line in lines)
    # the last validation of the training had blocks of 16 tokens: the same protocol gives the same number
    words = ["--context", "16", "--split", "validation", "--json", "--device", "cpu"]
    assert main([str(run), *words]) == 0
    found = json.loads(capsys.readouterr().out)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert found["perplexity"] == pytest.approx(last["eval_perplexity"], rel=1e-6)
    assert found["word_perplexity"] == pytest.approx(last["eval_word_perplexity"], rel=1e-6)


def test_json_is_an_object_a_model(made: tuple[TokenStore, Path], capsys: pytest.CaptureFixture[str]) -> None:
    store, run = made
    line = [str(exported(run)), str(run), "--split", "test", "--stride", "8", "--data", str(store.path), "--quiet"]
    assert main([*line, "--json", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    first, second = (json.loads(text) for text in out.splitlines())
    assert err == ""
    assert first["nll"] == second["nll"]
    assert (first["context"], first["stride"], first["split"], first["protocol"]) == (32, 8, "test", "free")
    tokens = store.splits["test"].tokens
    assert first["loss"] == pytest.approx(first["nll"] / (tokens - 1))
    assert first["bits_per_byte"] == pytest.approx(first["loss"] * tokens / math.log(2) / store.splits["test"].bytes)
    assert second["difference"]["tokens"]["mean"] == 0


def scored(capsys: pytest.CaptureFixture[str], model: Path, *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main([str(model), "--protocol", "free", "--split", "test", "--device", "cpu", "--json", *words]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_precision_is_that_of_the_stored_weights_unless_asked_for(
    made: tuple[TokenStore, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, run = made
    own, fp32, bf16 = (scored(capsys, run, *words) for words in ([], ["--precision", "fp32"], ["--precision", "bf16"]))
    assert [found["precision"] for found in (own, fp32, bf16)] == ["fp32", "fp32", "bf16"]
    assert own["nll"] == fp32["nll"], "also on a processor that multiplies bf16 faster"
    assert bf16["nll"] != fp32["nll"], "rounding to 8 bits shows"
    assert bf16["nll"] == pytest.approx(fp32["nll"], rel=1e-2)
    low = tmp_path / "low"
    shutil.copytree(exported(run), low)
    (low / "wikift.json").unlink()  # it is changed on purpose
    load_model(str(low)).bfloat16().save_pretrained(low)
    config = json.loads((low / "config.json").read_text())
    for name in ("dtype", "torch_dtype", None):  # as transformers 5 writes it, as 4 did, as the released GPT-2's
        config.pop("dtype", None)
        config.pop("torch_dtype", None)
        (low / "config.json").write_text(json.dumps(config | ({name: "bfloat16"} if name else {})))
        assert scored(capsys, low, "--data", str(store.path))["precision"] == "bf16"
    assert main([str(run), str(low), "--data", str(store.path), "--stride", "32", "--device", "cpu"]) == 0
    assert f"perplexity, {run} in fp32, {low} in bf16" in capsys.readouterr().out


def test_python_gets_the_results_and_nothing_is_printed(
    made: tuple[TokenStore, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    printed = scored(capsys, made[1])
    settings = EvaluateSettings(models=(str(made[1]),), protocol="free", split="test", device="cpu")
    (result,) = run(settings)
    assert capsys.readouterr() == ("", "")
    assert result.about["model"] == str(made[1])
    assert (result.score.loss, result.score.value("words")) == (printed["loss"], printed["word_perplexity"])
    with pytest.raises(UserError, match="--split none"):
        run(dataclasses.replace(settings, split="none"))


def test_torchrun_gives_the_same_number_once(made: tuple[TokenStore, Path], capsys: pytest.CaptureFixture[str]) -> None:
    _, run = made
    words = [str(exported(run)), "--protocol", "knn", "--split", "validation", "--json", "--device", "cpu"]
    assert main(words) == 0
    alone = json.loads(capsys.readouterr().out)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, str(ROOT / "launch" / "evaluate.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    together = json.loads(line)
    assert together["processes"] == 2
    assert together["nll"] == pytest.approx(alone["nll"], rel=1e-6)


def test_a_flip_in_an_exported_model_or_in_the_store_is_refused(made: tuple[TokenStore, Path], tmp_path: Path) -> None:
    store, run = made
    folder, data = shutil.copytree(exported(run), tmp_path / "model"), shutil.copytree(store.path, tmp_path / "store")
    (folder / "README.md").write_text("The card is its owner's.")
    words = [str(folder), "--data", str(data), "--split", "validation", "--device", "cpu", "--quiet"]
    assert main(words) == 0
    names = [path.name for path in folder.iterdir() if path.name not in FREE]
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(names)
    for path in (*(folder / name for name in names), data / "validation.bin"):
        sound = path.read_bytes()
        path.write_bytes(sound[:-3] + bytes([sound[-3] ^ 32]) + sound[-2:])
        with pytest.raises(UserError, match=f"{path.name}|its tokenizer"):
            main(words)
        path.write_bytes(sound)
    assert main(words) == 0
