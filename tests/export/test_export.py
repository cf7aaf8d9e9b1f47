"""From a checkpoint to a Hugging Face directory. Run: pytest tests/export/test_export.py"""

from __future__ import annotations

import json
import logging
import math
import shlex
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel
from transformers.utils import logging as transformers_logging

from tests.trained import SENTENCES
from wikift.base.errors import EnvironmentFault, UserError
from wikift.base.files import parse_size, sealed
from wikift.base.folders import step_folder
from wikift.base.publish import folder_lock
from wikift.checkpoint.reader import open_checkpoint
from wikift.commands.consolidate import main

ROOT = Path(__file__).resolve().parents[2]


def weights_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    saved = open_checkpoint(step_folder(run, step))
    return {name: saved.read(name, "weight", 0, math.prod(s)).reshape(s) for name, s in saved.shapes.items()}


def load_stock(folder: Path, caplog: pytest.LogCaptureFixture, **options: Any) -> tuple[Any, Any]:
    """Stock classes, with every warning an error and nothing logged by transformers."""
    transformers_logging.set_verbosity_warning()
    transformers_logging.enable_propagation()
    caplog.clear()
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        loaded = AutoModelForCausalLM.from_pretrained(folder, **options), AutoTokenizer.from_pretrained(folder)
    assert [record.getMessage() for record in caplog.records] == []
    return loaded


def test_stock_classes_load_it_bit_for_bit(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main([str(run)]) == 0
    model, tokenizer = load_stock(run / "hf", caplog)
    expected = weights_of(run, 12)
    loaded = dict(model.named_parameters())
    assert list(loaded) == list(expected)
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()
    assert model.dtype == torch.float32
    stored = AutoTokenizer.from_pretrained(run / "model")
    for row in SENTENCES:
        assert tokenizer(row)["input_ids"] == stored(row)["input_ids"]
        assert tokenizer.decode(tokenizer(row)["input_ids"]) == row
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_files_are_those_of_save_pretrained(
    run: Path, tmp_path: Path, dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert main([str(run), "--dtype", dtype, "--out", str(tmp_path / "ours")]) == 0
    assert main([str(run), "--dtype", dtype, "--out", str(tmp_path / "parts"), "--max-shard-size", "30KB"]) == 0
    model, _ = load_stock(tmp_path / "ours", caplog, dtype="auto")
    assert str(model.dtype) == f"torch.{dtype}"
    # one that was made here: of a loaded one save_pretrained deals the tensors out by name, not in the model's order
    fresh = GPT2LMHeadModel(model.config).to(model.dtype)
    fresh.load_state_dict(model.state_dict())
    fresh.generation_config = model.generation_config
    fresh.save_pretrained(tmp_path / "theirs")
    fresh.save_pretrained(tmp_path / "their-parts", max_shard_size="30KB")
    for ours, theirs in (("ours", "theirs"), ("parts", "their-parts")):
        names = sorted(path.name for path in (tmp_path / theirs).iterdir() if "safetensors" in path.name)
        assert sorted(p.name for p in (tmp_path / ours).iterdir() if "safetensors" in p.name) == names
        for name in (*names, "config.json", "generation_config.json"):
            one, two = (tmp_path / folder / name for folder in (ours, theirs))
            if name.endswith(".json"):
                assert json.loads(one.read_text()) == json.loads(two.read_text()), name
            else:
                assert one.read_bytes() == two.read_bytes(), name
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    whole, parts = model.state_dict(), load_stock(tmp_path / "parts", caplog, dtype="auto")[0].state_dict()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_step_and_best_and_one_checkpoint_choose(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = step_folder(run, 8) / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(sealed({**content, "eval_loss": 0.5})))
    choices = [([str(run)], 12), ([str(run), "--step", "4"], 4), ([str(run), "--best"], 8),
               ([str(step_folder(run, 4)), "--dtype", "float32"], 4)]  # fmt: skip
    for line, step in choices:
        out = tmp_path / f"it's {len(line)} {step}"
        assert main([*line, "--out", str(out)]) == 0
        printed, quoted = capsys.readouterr().out, shlex.quote(str(out))
        assert f"step {step}" in printed
        store = json.loads((run / "config.json").read_text())["store_path"]
        assert f"wikift evaluate {quoted} --data {store}\n" in printed  # away from its run a model knows no text
        assert f"wikift generate {quoted}" in printed
        expected = weights_of(run, step)
        model = AutoModelForCausalLM.from_pretrained(out)
        assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())
        assert json.loads((out / "wikift.json").read_text())["step"] == step
    assert main([str(step_folder(run, 8)), "--quiet"]) == 0  # of one checkpoint too the default is RUN/hf
    assert json.loads((run / "hf" / "wikift.json").read_text())["step"] == 8
    assert capsys.readouterr().out == ""


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_what_only_a_run_can_refuse(run: Path, tmp_path: Path) -> None:
    """Other wrong command lines: tests/commands/test_wrong.py."""
    unscored, early = shutil.copytree(run, tmp_path / "unscored"), tmp_path / "early"
    for manifest in unscored.rglob("manifest.json"):
        manifest.write_text(json.dumps(sealed({**json.loads(manifest.read_text()), "eval_loss": None})))
    (early / "checkpoints" / "step-00000004").mkdir(parents=True)  # without a manifest: not complete
    shutil.copy(run / "config.json", early)
    before = snapshot(tmp_path)
    for line, expected in (
        ([str(early)], "has no checkpoint yet; train it further: wikift train "),
        ([str(unscored), "--best"], "--best: .*validated.* 4, 8, 12"),
        ([str(step_folder(run, 4)), "--step", "4"], "--step: .* is one checkpoint"),
        ([str(run), "--out", str(run)], "--out .* did not export"),
    ):
        with pytest.raises(UserError, match=expected):
            main(line)
    assert snapshot(tmp_path) == before


def test_an_earlier_export_is_replaced_another_runs_is_not(run: Path, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "models" / "mine"
    assert main([str(run), "--step", "4", "--out", str(out), "--max-shard-size", "30KB"]) == 0
    assert main([str(run), "--out", str(out)]) == 0
    assert json.loads((out / "wikift.json").read_text())["step"] == 12
    assert [p.name for p in out.glob("*.safetensors*")] == ["model.safetensors"], "nothing of the earlier one is left"
    other = run.with_name("other")
    run.rename(other)
    with pytest.raises(UserError, match=r"another run \(small\)"):
        main([str(other), "--out", str(out)])
    assert main([str(other)]) == 0
    assert main([str(other), "--step", "4"]) == 0  # in the run's own hf any earlier export gives way
    assert json.loads((other / "hf" / "wikift.json").read_text())["step"] == 4


def test_only_a_runs_own_files_are_exported(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No code, no pickle, no link; and nothing is written through a link in the place of the export."""
    source, secret, elsewhere = run / "model", tmp_path / "secret", tmp_path / "elsewhere"
    secret.write_text("mine")
    assert main([str(run), "--out", str(elsewhere)]) == 0
    before = snapshot(elsewhere)
    (source / "wikift.json").unlink()  # whose checksums would refuse all that follows
    for name in ("modeling.py", "weights.pkl", "pytorch_model.bin", "additional_chat_templates/x.jinja"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("x")
    (source / "a-link").symlink_to(secret)
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((source / name).read_text())
        (source / name).write_text(json.dumps({**content, "auto_map": {"AutoTokenizer": ["modeling.T", None]}}))
    (run / "hf").symlink_to(elsewhere)
    for _ in range(2):
        assert main([str(run)]) == 0
        assert (
            f"not exported, no run of wikift wrote it: a-link, modeling.py, pytorch_model.bin, weights.pkl in {source}"
            in (capsys.readouterr().out)
        )
    assert snapshot(elsewhere) == before
    exported = snapshot(run / "hf")
    assert set(exported) - set(before) == {"additional_chat_templates/x.jinja"}
    assert not [name for name, content in exported.items() if b"auto_map" in content]
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").symlink_to(secret)
    with pytest.raises(UserError, match=r"tokenizer\.json: is missing or a link, not a file; the run is damaged"):
        main([str(run)])
    assert snapshot(run / "hf") == exported


def test_two_at_once_do_not_mix(run: Path) -> None:
    with folder_lock(run / "hf"):
        with pytest.raises(EnvironmentFault, match="another process is writing it"):
            main([str(run)])
        assert not (run / "hf").exists()
    assert main([str(run)]) == 0


def test_a_damaged_checkpoint_is_refused(run: Path) -> None:
    assert main([str(run), "--step", "4"]) == 0
    before = snapshot(run / "hf")
    file = step_folder(run, 12) / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"sha256.*another: --step 8"):
        main([str(run)])
    file.write_bytes(content[:-5])
    with pytest.raises(UserError, match=r"bytes.*another: --step 8"):
        main([str(run)])
    assert snapshot(run / "hf") == before
    (run / "model" / "config.json").write_text("{")
    for problem in (r"config\.json: has changed since the run wrote it", r"config\.json: cannot be read"):
        with pytest.raises(UserError, match=problem):
            main([str(run), "--step", "8"])
        (run / "model" / "wikift.json").unlink(missing_ok=True)
    assert snapshot(run / "hf") == before
    assert not (run / ".hf.partial").exists()


def test_sizes() -> None:
    sizes = {"5GB": 5 * 10**9, "500 MB": 5 * 10**8, "1.5kb": 1500, "2GiB": 2**31, "123": 123, "1TB": 10**12,
             "3KiB": 3072}  # fmt: skip
    assert {text: parse_size(text) for text in sizes} == sizes
    for text in ("", "GB", "-1GB", "0", "0.1", "5 apples", "1e3", "5GBs", "٣GB"):
        with pytest.raises(UserError, match="--max-shard-size"):
            parse_size(text)


def test_a_folder_that_cannot_be_made(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match="was not made"):
        main([str(run), "--out", str(tmp_path / "file" / "out")])


_FORMAT_UTILS = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch"
THIRD_PARTY = [  # a file of it, what is named, the command
    ("zero/global_step2/zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero/global_step2",
     "python zero/zero_to_fp32.py zero OUT -t global_step2,"),
    ("my dcp/.metadata", "my dcp", f"{_FORMAT_UTILS} 'my dcp' OUT.pt,"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "named", "command"), THIRD_PARTY)
def test_a_third_party_checkpoint_is_refused_with_the_command_that_converts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, named: str, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(file).parent.mkdir(parents=True)
    Path(file).touch()
    with pytest.raises(UserError) as caught:
        main([named])
    (problem,) = caught.value.problems
    assert problem.startswith(f"{named}: is a checkpoint of ")
    assert command in problem
    assert "docs/how-to/third-party-checkpoints.md" in problem
    assert not Path(named, "hf").exists()
