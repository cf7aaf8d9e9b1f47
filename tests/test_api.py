"""The Python API: public names, results in place of prints, exceptions in place of exit codes."""

from __future__ import annotations

import doctest
import math
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import wikift
from tests.trained import text_store, trained_run

SHAPE = "n_layer=1,n_head=2,n_embd=32,n_positions=32"


def test_public_names_are_complete_and_sorted() -> None:
    assert wikift.__all__ == sorted(wikift.__all__)
    public = {name for name in dir(wikift) if not name.startswith("_")}
    from wikift import api

    for name in [name for name in wikift.__all__ if name != "__version__"]:
        assert getattr(wikift, name) is getattr(api, name)
    assert sorted([*api.__all__, "__version__"]) == wikift.__all__
    modules = {name for name in public if name in vars(wikift) and isinstance(vars(wikift)[name], type(sys))}
    assert public - modules - {"annotations", "Any", "TYPE_CHECKING"} == {*wikift.__all__} - {"__version__"}
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = wikift.trian


def test_import_is_instant() -> None:
    code = "import sys, wikift; assert wikift.__version__; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name for name in done.stdout.split() if name.startswith("wikift")}
    assert loaded == {"wikift"}
    assert not {"torch", "transformers", "argparse"} & set(done.stdout.split())


def test_the_documentations_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    results = doctest.testmod(wikift)
    assert results.attempted >= 2
    assert results.failed == 0


def test_the_whole_job_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "my.txt"
    text.write_text("".join(f"the {n} towers of {n * n} metres are tall .\n" for n in range(300)))
    store = wikift.prepare(dataset=text, tokenizer="train:300", out=tmp_path / "store", quiet=True)
    assert store == tmp_path / "store"
    settings = {"data": store, "from_scratch": True, "config_overrides": SHAPE, "block_size": 32,
                "global_batch_size": 4, "output_dir": tmp_path / "run", "device": "cpu", "quiet": True}  # fmt: skip
    assert "max_steps = 4" in wikift.plan(max_steps=4, **{k: v for k, v in settings.items() if k != "quiet"})
    assert not (tmp_path / "run").exists()
    result = wikift.train(max_steps=4, save_steps=2, **settings)
    assert result.output_dir == tmp_path / "run"
    assert not result.interrupted
    assert result.metrics["step"] == 4
    assert math.isfinite(result.metrics["eval_loss"])
    with pytest.raises(wikift.UserError, match="dtyp: unknown option"):
        wikift.consolidate(result.output_dir, dtyp="float16")
    assert not (result.output_dir / "hf").exists(), "nothing is done with half of the settings"
    model = wikift.consolidate(result.output_dir)
    assert (model / "model.safetensors").is_file()
    (score,) = wikift.evaluate(model, data=store, split="validation", protocol="blocks", device="cpu")
    assert score.about["split"] == "validation"
    texts = wikift.generate(
        model, ["the 3", "the 40 towers of"], max_new_tokens=3, device="cpu", num_return_sequences=2
    )
    assert len(texts) == 4
    assert wikift.generate(model, "the 3", max_new_tokens=3, device="cpu", num_return_sequences=2) == texts[:2]


def test_problems_are_one_exception_and_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(wikift.UserError) as error:
        wikift.train(max_stps=5, learning_rate=-1, block_size="8", dry_run=True, data="none")
    problems = error.value.problems
    assert [p for p in problems if p.startswith("max_stps: unknown option (did you mean max_steps?)")]
    assert [p for p in problems if p.startswith("block_size 8: must be a whole number, without quotes")]
    assert [p for p in problems if p.startswith("dry_run: has no effect in Python")]
    with pytest.raises(wikift.UserError, match="learning_rate -1: must be above 0"):
        wikift.train(learning_rate=-1)
    with pytest.raises(wikift.UserError, match="no such folder"):
        wikift.consolidate("none")
    with pytest.raises(wikift.UserError, match="prompts_file: has no effect"):
        wikift.generate("none", "a", prompts_file="b")
    with pytest.raises(wikift.UserError, match="none"):
        wikift.evaluate("none")
    assert capfd.readouterr() == ("", "")


def test_outside_of_the_main_thread(tmp_path: Path) -> None:
    """No signal handlers there, which Python would refuse; those of the main thread stay."""
    text_store(tmp_path / "store")
    before = signal.getsignal(signal.SIGTERM)
    runs: list[Path] = []
    thread = threading.Thread(
        target=lambda: runs.append(trained_run(tmp_path / "run", tmp_path / "store")), name="notebook"
    )
    thread.start()
    thread.join()
    assert runs
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("module", ["commands.train", "data.store", "api"])
def test_a_module_is_no_program(module: str, tmp_path: Path) -> None:
    words = [sys.executable, "-m", f"wikift.{module}", "--help"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"wikift: wikift.{module} is no program; use python -m wikift COMMAND\n"
