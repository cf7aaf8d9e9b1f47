"""What somebody planted in a model, and what is in the environment: no code of it runs, no secret of it is written.

pytest tests/fuzz/test_planted.py
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.fuzz.test_fuzz import bounded
from tests.trained import text_store, trained_run
from wikift.base.files import sealed
from wikift.commands import consolidate, evaluate, generate, main, prepare, report, train

SECRETS = {"HF_TOKEN": "hf_canary0token", "WANDB_API_KEY": "canary1key", "HF_ENDPOINT": "http://me:canary2@127.0.0.1:1"}


class Planted:
    """A pickle that makes a folder where it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def test_no_code_of_a_model_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor is it offered to run it, and a `y` is no consent."""
    store = text_store(tmp_path / "store").path
    run = trained_run(tmp_path / "run", store)
    assert consolidate.main([str(run), "--quiet"]) == 0
    model, mark, text = run / "hf", tmp_path / "ran", tmp_path / "a.txt"
    for record in (model / "wikift.json", run / "model" / "wikift.json"):  # checksums would refuse all that follows
        record.unlink()
    made = json.loads((store / "store.json").read_text())
    made["tokenizer"].pop("files")
    (store / "store.json").write_text(json.dumps(sealed(made)))
    text.write_text("Steam engines drove it .\n" * 40)
    for folder in (model, store / "tokenizer", run / "model"):
        for name in ("config.json", "tokenizer_config.json"):
            path = folder / name
            content = json.loads(path.read_text()) if path.exists() else {}
            classes = {
                "AutoTokenizer": [None, "planted.T"],
                "AutoConfig": "planted.C",
                "AutoModelForCausalLM": "planted.M",
            }
            path.write_text(json.dumps({**content, "auto_map": classes}))
        (folder / "planted.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
        for name in ("pytorch_model.bin", "training_args.bin", "tokenizer.pkl"):
            (folder / name).write_bytes(pickle.dumps(Planted(mark)))
    (model / "generation_config.json").write_text('{"custom_generate": "planted.py", "auto_map": {"x": "planted.x"}}')
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 99))
    (tmp_path / "prompts.txt").write_text("a\n")
    short = "--max-steps 1 --device cpu --sample-steps 1 --sample-prompts prompts.txt"
    scratch = "--from-scratch --config-overrides n_layer=1,n_head=1,n_embd=8,n_positions=16"
    for command, line in (
        (generate, f"{model} --prompt a --max-new-tokens 1"),
        (evaluate, f"{model} --data {store} --device cpu"),
        (prepare, f"--dataset {text} --tokenizer {model} --out made"),
        (train, f"--model {model} --dataset {text} {short} --output-dir other"),
        (train, f"--data {store} {scratch} {short} --output-dir third"),
    ):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as left, bounded():
            main.run(command.main, shlex.split(line))
        out, err = capsys.readouterr()
        assert left.value.code == 0, (line, out, err)
        assert "trust" not in out + err
        assert not mark.exists(), line


def test_no_secret_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    run = tmp_path / "run"

    def ask_for_stacks() -> None:
        while not (run / "metrics.jsonl").exists():
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGUSR2)

    threading.Thread(target=ask_for_stacks, daemon=True).start()
    trained_run(run, text_store(tmp_path / "store").path, quiet=False)
    assert (run / "stacks" / "rank-0.txt").stat().st_size
    assert consolidate.main([str(run)]) == 0
    assert report.main([str(run)]) == 0
    with pytest.raises(SystemExit):
        main.run(evaluate.main, ["some/model", "--data", str(tmp_path / "store")])
    printed = "".join(capsys.readouterr())
    assert "some/model" in printed
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert "canary" not in printed
    assert b"canary" not in written
