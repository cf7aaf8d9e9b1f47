"""The command line: how words and config files become settings, what --help shows, how a command ends."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from wikift.base.errors import EnvironmentFault, UserError
from wikift.commands import main as exits
from wikift.settings.fields import PrepareSettings, TrainSettings
from wikift.settings.options import flag, parse, parse_all
from wikift.settings.run_fields import SETTINGS, ConsolidateSettings, EvaluateSettings, GenerateSettings

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
Main = Callable[[Sequence[str]], int]


def parsed(*words: str) -> TrainSettings:
    return parse(TrainSettings, words)


def problems(*words: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        parsed(*words)
    return list(caught.value.problems)


def written(path: Path, content: str) -> str:
    path.write_text(content, encoding="utf-8")
    return str(path)


# --- words -------------------------------------------------------------------------------------------------------


def test_dashes_and_underscores_are_the_same_in_names_and_kept_in_values() -> None:
    for field in dataclasses.fields(TrainSettings):
        kind = str(field.type)
        if kind.startswith("bool"):
            name = field.name if field.default is False else "no_" + field.name
            words: list[list[str]] = [[flag(name)], ["--" + name]]
        else:
            choices = field.metadata["choices"]
            value = choices[-1] if choices else "a_b-c" if kind.startswith("str") else "3" if "int" in kind else "0.5"
            if field.name == "config":
                continue
            words = [[flag(field.name), value], [f"--{field.name}={value}"], [f"--{field.name}", value]]
        first, *others = [getattr(parse_all(TrainSettings, line).settings, field.name) for line in words]
        assert all(other == first for other in others)
        assert first != field.default or field.metadata["choices"], field.name
    assert parsed("--output_dir", "my_run-1").output_dir == "my_run-1"


def test_numbers_below_zero_and_texts_with_a_dash_are_values() -> None:
    assert parse(GenerateSettings, ["--prompt", "- a", "--stop", "-- b"]).prompt == "- a"
    assert problems("--learning-rate", "-1e-5", "--dropout", "-.5") == [
        "--learning-rate -1e-5: must be above 0",
        "--dropout -.5: must be at least 0 and below 1",
    ]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--max-steps", "1.5"], "--max-steps 1.5: must be a whole number"),
        (["--max-steps", "1e3"], "--max-steps 1e3: must be a whole number"),
        (["--learning-rate", "fast"], "--learning-rate fast: must be a number"),
        (["--learning-rate", "nan"], "--learning-rate nan: must be a finite number"),
        (["--precision", "fp8"], "--precision fp8: must be one of auto, bf16, fp16, fp32"),
        (["--output-dir", ""], "--output-dir '': must not be empty"),
        (["--model", os.fsdecode(b"caf\xe9")], "must be UTF-8 text"),
        (["--max-steps"], "--max-steps: needs a value"),
        (["--dry-run=yes"], "--dry-run yes: takes no value; write --dry-run or --no-dry-run"),
        (["--gradient_checkpointing", "True"], "--gradient-checkpointing True: takes no value"),
        (["--max-steps", "1", "--max_steps=2"], "--max-steps: is set 2 times (1, 2); keep one"),
        (["--max-steps", "0"], "--max-steps 0: must be 1 or more"),
        (["--adam-beta1", "1"], "--adam-beta1 1: must be at least 0 and below 1"),
        (["--warmup-steps", "1.5"], "--warmup-steps 1.5: must be a whole number, or a fraction below 1"),
        (["--max-steps", "5", "--num-train-epochs", "2"], "cannot be used with --num-train-epochs 2; remove one of"),
        (["--data", "x", "--no-append-eos"], "--no-append-eos: cannot be used with --data x; remove one of the two"),
        (["--config-overrides", "n_layer=1"], "has no effect without --from-scratch; add that, or remove this"),
        (["--wandb", "--no-wandb"], "--wandb: is set 2 times (True, False); keep one"),
        (["5"], "5: is not an option, and none takes it; write --NAME VALUE"),
        (["--max-step", "5"], "--max-step: unknown option (did you mean --max-steps?)"),
        (["--learning_rte=5"], "--learning_rte: unknown option (did you mean --learning-rate?)"),
        (["-max-steps", "5"], "-max-steps: is --max-steps 5 here"),
        (["--train.max_steps=5"], "--train.max_steps: is --max-steps 5 here"),
        (["--fp16", "False"], "--fp16: omit it"),
        (["--dtype", "bfloat16"], "--dtype: is --precision here; bf16, fp16 or fp32"),
        (["--dataset_config_name", "wikitext-2-v1"], "of WikiText the name: --dataset wikitext-2-v1"),
        (["--zzz"], "--zzz: unknown option; see --help"),
        (["--fp16", "True"], "--fp16: is --precision fp16 here"),
        (["--model_name_or_path", "my model"], "--model_name_or_path: is --model 'my model' here"),
        (["--warmup_ratio=.1"], "--warmup_ratio: is --warmup-steps .1 here; below 1 it is a fraction of the run"),
        (["--do_train"], "--do_train: omit it, `wikift train` trains"),
        (["--lr-scheduler-type", "cosin"], "(did you mean cosine?)"),
    ],
)
def test_a_wrong_word_is_one_problem_that_says_what_to_do(words: list[str], expected: str) -> None:
    (problem,) = problems(*words)
    assert expected in problem


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    config = written(tmp_path / "run.toml", 'max_step = 5\nlearning_rate = "1e-4"\nseed = 3')
    found = problems(
        "--config", config, "--dropout", "x", "--engine", "zero", "--what", "7", "--seed", "1.5", "--quiet=1", "--model"
    )
    for name in ("max_step", "learning_rate", "--dropout", "--engine", "--what", "--seed", "--quiet", "--model"):
        assert [problem for problem in found if problem.startswith((name + " ", name + ":"))]
    assert len(found) == 8


# --- config files ------------------------------------------------------------------------------------------------


def test_toml_and_json_say_the_same_and_the_command_line_wins(tmp_path: Path) -> None:
    toml = written(
        tmp_path / "a.toml", '\ufeff# ours\r\nmax-steps = 7\nlearning_rate = 1\nmodel = "distilgpt2"\nwandb = true'
    )
    content = {"max_steps": 7, "learning-rate": 1, "model": "distilgpt2", "wandb": True}
    from_json = written(tmp_path / "a.json", json.dumps(content))
    expected = TrainSettings(max_steps=7, learning_rate=1.0, model="distilgpt2", wandb=True)
    for file in (toml, from_json):
        assert dataclasses.replace(parsed("--config", file), config=None) == expected
        assert isinstance(parsed("--config", file).learning_rate, float)
        line = parsed("--config", file, "--model", "gpt2", "--max_steps", "9", "--no-wandb")
        assert (line.model, line.max_steps, line.learning_rate, line.wandb) == ("gpt2", 9, 1.0, False)
    words = ["--config", toml, "--max_steps=9", "--model", "gpt2"]
    assert parse_all(TrainSettings, words).typed == {  # how each was set
        "config": f"--config {toml}", "max_steps": "--max-steps 9", "model": "--model gpt2",
        "learning_rate": f"learning_rate 1 in {toml}", "wandb": f"wandb True in {toml}",
    }  # fmt: skip


def test_an_answer_on_the_line_displaces_what_hangs_on_the_question_in_the_file(tmp_path: Path) -> None:
    file = written(
        tmp_path / "run.toml",
        'num_train_epochs = 2\ndataset = "demo"\ndataset_config = "x"\ntokenizer = "train:300"\nseed = 5',
    )
    assert parsed("--config", file).num_train_epochs == 2
    steps = parsed("--config", file, "--max-steps", "5")
    assert (steps.max_steps, steps.num_train_epochs, steps.dataset, steps.seed) == (5, None, ("demo",), 5)
    store = parsed("--config", file, "--data", "store")
    assert (store.data, store.dataset, store.tokenizer, store.num_train_epochs) == ("store", None, None, 2)
    other = parsed("--config", file, "--dataset", "my.txt")
    assert (other.dataset, other.dataset_config, other.tokenizer) == (("my.txt",), None, "train:300")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.toml", "max_steps = 1.5", "max_steps 1.5 in {}: must be a whole number"),
        ("a.toml", "learning_rate = nan", "learning_rate nan in {}: must be a finite number"),
        ("a.json", '{"learning_rate": 1' + "0" * 400 + "}", "in {}: must be a number"),
        ("a.toml", 'max_steps = "5"', "max_steps 5 in {}: must be a whole number, without quotes"),
        ("a.toml", "max_steps = true", "max_steps True in {}: must be a whole number, not true or false"),
        ("a.toml", "model = 5", "model 5 in {}: must be text, in quotes"),
        ("a.toml", 'model = "a\\u0000"', "in {}: must not be empty"),
        ("a.toml", 'wandb = "true"', "wandb true in {}: must be true or false"),
        ("a.toml", "[train]\nmax_steps = 5", "train in {}: unknown option; see --help"),
        ("a.toml", 'config = "b.toml"', "config in {}: unknown option; see --help"),
        ("a.toml", "max_steps = 5\nmax-steps = 6", "max_steps in {}: is set twice, with - and with _"),
        ("a.toml", "lr = 1e-4", "lr in {}: is learning_rate 0.0001 here"),
        ("a.toml", "max_steps: 5", "--config {}: not valid TOML"),
        ("a.json", "max_steps = 5", "--config {}: not valid JSON"),
        ("a.json", "[5]", "--config {}: holds a list, not a table of settings"),
    ],
)
def test_a_wrong_file_is_one_problem_that_names_it(tmp_path: Path, name: str, content: str, expected: str) -> None:
    file = written(tmp_path / name, content)
    (problem,) = problems("--config", file)
    assert expected.format(file) in problem


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b'model = "caf\xe9"')
    for file in (tmp_path / "none.toml", tmp_path, tmp_path / "latin.toml"):
        (problem,) = problems("--config", str(file))
        assert problem.startswith(f"--config {file}: cannot be read")
    assert len(problems("--config", str(tmp_path), "--seed", "x")) == 2


def test_a_home_folder_is_expanded_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    written(tmp_path / "a.toml", 'output_dir = "~/run"\ndataset = ["~/a.txt", "b.txt"]')
    line = parsed("--config=~/a.toml", "--model", "~/model", "--tokenizer=~/t", "--resume=~/r/checkpoints/x")
    assert (line.output_dir, line.dataset) == (f"{tmp_path}/run", (f"{tmp_path}/a.txt", "b.txt"))
    assert (line.model, line.tokenizer) == (f"{tmp_path}/model", f"{tmp_path}/t")
    assert line.resume == f"{tmp_path}/r/checkpoints/x"
    assert parse(EvaluateSettings, ["~/a", "b"]).models == (f"{tmp_path}/a", "b")
    assert parse(GenerateSettings, ["--prompt", "~/a"]).prompt == "~/a"
    for settings in (PrepareSettings, TrainSettings, ConsolidateSettings, EvaluateSettings, GenerateSettings):
        paths = {"config", "data", "deepspeed", "model", "out", "output_dir", "prompts_file", "run", "sample_prompts"}
        named = {field.name for field in dataclasses.fields(settings) if field.metadata["path"]}
        assert paths & {field.name for field in dataclasses.fields(settings)} <= named


# --- positional settings -----------------------------------------------------------------------------------------


def test_positional_settings() -> None:
    def models(*words: str) -> tuple[str, ...]:
        return parse(EvaluateSettings, words).models

    assert models() == ()
    for words in (["a", "b", "--split", "test"], ["a", "--split", "test", "b"], ["--split", "test", "a", "b"]):
        assert models(*words) == ("a", "b")
    assert parse(ConsolidateSettings, ["run"]).run == "run"
    assert parse(ConsolidateSettings, []).run is None
    with pytest.raises(UserError, match="other: is not an option"):
        parse(ConsolidateSettings, ["run", "other"])
    with pytest.raises(UserError, match=r"MODEL .*must not be empty"):
        models("a", "")
    assert parse(GenerateSettings, ["--prompt", ""]).prompt == ""


# --- help --------------------------------------------------------------------------------------------------------


def test_every_launch_script_is_tested_here() -> None:
    assert {path.stem for path in LAUNCH.glob("*.py")} == set(SETTINGS)


def help_of(command: str, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as left:
        exits.main([command, "--help"])
    assert left.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", SETTINGS)
@pytest.mark.parametrize("columns", [60, 200])
def test_help_fits_and_shows_groups_settings_and_defaults(
    command: str, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = help_of(command, columns, monkeypatch, capsys)
    assert max(map(len, text.splitlines())) <= columns
    headings = re.findall(r"^(\w+):$", text, re.MULTILINE)
    assert len(headings) == len(set(headings))
    fields = dataclasses.fields(SETTINGS[command])
    assert {f.metadata["group"] for f in fields if not f.metadata["positional"]} <= set(headings)
    entries = re.split(r"\n  (?=-|[A-Z])", text.split("\n\n", 1)[1])
    for field in fields:
        meta = field.metadata
        start = (meta["metavar"] or "") if meta["positional"] else flag(field.name)
        (entry,) = [e for e in entries if re.match(re.escape(start) + r"[ ,\n]", e)]
        words = "".join(re.split(r"\n\n", entry)[0].split())  # lines are broken inside of words with a dash
        assert "".join(meta["help"].split()) in words
        if meta["metavar"]:
            assert meta["metavar"] in words
        default = meta["shown"] if meta["shown"] is not None else field.default
        if default not in (None, "", ()) and default is not False:
            assert f"default:{'yes' if default is True else default})".replace(" ", "") in words, field.name


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_help_as_a_process_is_instant(command: str, tmp_path: Path) -> None:
    line = [sys.executable, "-X", "importtime", str(LAUNCH / f"{command}.py"), "--help"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "COLUMNS": "80"})
    assert done.returncode == 0
    assert done.stdout.startswith("usage: ")
    imported = {row.rsplit("|", 1)[1].strip() for row in done.stderr.splitlines() if row.startswith("import time:")}
    assert "wikift.settings.options" in imported
    assert not imported & {"torch", "transformers", "datasets", "tokenizers", "pyarrow", "rich", "wandb"}
    assert list(tmp_path.iterdir()) == []


# --- how a command ends ------------------------------------------------------------------------------------------


def ended(command: Main, capsys: pytest.CaptureFixture[str]) -> tuple[Any, str]:
    with pytest.raises(SystemExit) as left:
        exits.run(command, ["a"])
    return left.value.code, capsys.readouterr().err


def test_exit_codes_and_messages(capsys: pytest.CaptureFixture[str]) -> None:
    def raising(error: BaseException) -> Main:
        def command(argv: Sequence[str]) -> int:
            raise error

        return command

    assert ended(lambda argv: len(argv) + 74, capsys) == (75, "")
    assert ended(raising(UserError("--a: no")), capsys) == (2, "wikift: one problem\n  --a: no\n")
    assert ended(raising(UserError("--a: no", "--b: no")), capsys) == (2, "wikift: 2 problems\n  --a: no\n  --b: no\n")
    assert ended(raising(EnvironmentFault("full")), capsys) == (1, "wikift: full\n")
    assert ended(raising(KeyboardInterrupt()), capsys) == (130, "wikift: interrupted\n")
    with pytest.raises(ZeroDivisionError):  # a fault of wikift's keeps its traceback
        exits.run(raising(ZeroDivisionError()), [])


def test_only_the_first_rank_speaks_and_all_leave_with_the_code(tmp_path: Path) -> None:
    line = [sys.executable, str(LAUNCH / "train.py"), "--max-steps", "0"]
    for rank, says in (("0", "--max-steps 0: must be 1 or more"), ("1", "")):
        env = {**os.environ, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
        done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=env)
        assert done.returncode == 2
        assert done.stdout == ""
        assert says in done.stderr
        assert bool(done.stderr) == bool(says)


def test_a_pipe_that_is_closed_early_is_no_traceback(tmp_path: Path) -> None:
    line = f"{sys.executable} {LAUNCH / 'train.py'} --dry-run | true"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, cwd=tmp_path)
    assert done.stderr == ""
