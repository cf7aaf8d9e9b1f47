"""Wrong command lines and wrong files: exit code 2, a line for each problem, no traceback, nothing written."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.settings.test_options import LAUNCH
from tests.tiny import SHAPE, tiny_store
from tests.trained import text_store, trained_run
from wikift.commands import main as exits
from wikift.data.store import Encoded, write_store

FITS = (
    f"--data store --from-scratch --config-overrides {SHAPE} --block-size 8 --global-batch-size 8 --max-steps 12 "
    "--output-dir out"
)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder full of things that are not quite right, and a run that is."""
    work = tmp_path_factory.mktemp("wrong")
    files: dict[str, str | bytes] = {
        "a-file": "not a folder",
        "types.toml": "max_steps = 1.5\nwandb = 1\nmodel = 7",
        "not-json.json": '{"max_steps": 5',
        "zero0.json": '{"zero_optimization": {"stage": 0}}',
        "no-zero.json": '{"optimizer": {"type": "Lamb"}, "gradient_clipping": 0.5, "zero_optimisation": {"stage": 2}}',
        "batch.json": '{"zero_optimization": {"stage": 2}, "train_batch_size": 8, "gradient_accumulation_steps": 3}',
        "no-config/readme.txt": "a model was here",
        "bert/config.json": '{"model_type": "bert"}',
        "broken/config.json": '{"model_type": "gpt2", ',
        "garbled/config.json": '{"model_type": "gpt2", "n_layer": "two"}',
        "small-model/config.json": json.dumps(
            {"model_type": "gpt2", "n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 16, "vocab_size": 50}
        ),
        "no-store/notes.txt": "nothing",
        "foreign/store.json": '{"format": "mosaic-1", "splits": {}}',
        "garbled-store/store.json": '{"format": "wikift-store-1", "splits": {}}',
        "empty.txt": "",
        "blank.txt": "\n \n\n",
        "latin.txt": "good line\ncaf\xe9\n".encode("latin-1"),
        "good.txt": "The tower is 324 metres tall .\n" * 50,
        "rows.jsonl": '{"body": "a row"}\n{"body": "another"}\n',
        "broken.jsonl": '{"text": "a row"}\n{"text": \n',
        "prompts-empty.txt": " \n\n",
        "prompts-latin.txt": b"good\ncaf\xe9\n",
        "runs/small/config.json": '{"wikift": "0"}',
        "runs/small/checkpoints/step-00000012/manifest.json": "{}",
        "runs/empty/config.json": '{"wikift": "0", "command": "wikift train --seed 3 --output-dir runs/empty"}',
    }
    for name, content in files.items():
        path = work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for name in ("config.json", "store.json"):  # pipes into which nobody writes
        (work / "pipes").mkdir(exist_ok=True)
        os.mkfifo(work / "pipes" / name)
    tiny_store(work / "store")
    tiny_store(work / "short", train=8)
    tiny_store(work / "no-validation", validation=0)
    shutil.copytree(work / "store", work / "truncated")
    with open(work / "truncated" / "train.bin", "r+b") as file:
        file.truncate(100)
    shutil.copytree(work / "store", work / "damaged")
    with open(work / "damaged" / "train.bin", "r+b") as file:
        file.write(b"\xff\xff")
    text = text_store(work / "text")
    one = {"validation": [Encoded(np.array([5], np.uint16), 1, 2, 1)]}
    same = {"vocab_size": text.vocab_size, "eos_token_id": 0, "tokenizer_fingerprint": text.tokenizer_fingerprint}
    write_store(work / "one-token", one, **same)
    trained_run(work / "run", work / "text")
    return work


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file in a folder, by path, and the folders in it; a lock comes and goes."""
    found = {}
    for path in folder.rglob("*"):
        about = path.lstat()
        found[str(path.relative_to(folder))] = (-1, 0) if path.is_dir() else (about.st_size, about.st_mtime_ns)
    return found


def check(code: Any, out: str, err: str, expected: list[str]) -> None:
    """Exit code 2 and one line for each problem, each naming its setting and value."""
    assert code == 2, (code, out, err)
    assert "Traceback" not in out + err
    head, *lines = err.removeprefix("wikift: loading torch ...\n").splitlines()
    assert head == f"wikift: {'one problem' if len(expected) == 1 else f'{len(expected)} problems'}", err
    assert len(lines) == len(expected), err
    for words in expected:
        assert len([text for text in lines if words in text]) == 1, (words, err)


def merged(defaults: str, line: str) -> str:
    """The line with those of the default options that it does not set itself."""
    kept = [text for text in re.findall(r"--[^-].*?(?= --|$)", defaults) if f"{text.split()[0]} " not in f"{line} "]
    return " ".join([line, *kept])


@pytest.fixture
def refused(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command in this process and checks that it is refused, with what words, and writes nothing."""
    monkeypatch.chdir(work)

    def run(command: str, line: str, *expected: str) -> None:
        before = listing(work)
        with pytest.raises(SystemExit) as left:
            exits.run(exits.main, [command, *shlex.split(line)])
        check(left.value.code, *capsys.readouterr(), list(expected))
        assert listing(work) == before

    return run


def cases(name: str) -> list[Any]:
    """A table's rows `LINE -> PROBLEM | PROBLEM`: (its name, line, problems)."""
    rows = [row.split("-> ") for row in TABLES[name][2].replace("\\\n", "").strip().splitlines()]
    return [pytest.param(name, line, problems.split(" | "), id=f"{name}: {line}") for line, problems in rows]


TRAIN = r"""
--learning-rate -1e-4 -> --learning-rate -1e-4: must be above 0
--deepspeed none.json -> --deepspeed none.json: cannot be read
--deepspeed not-json.json -> --deepspeed not-json.json: cannot be read (not valid JSON
--deepspeed zero0.json --engine single -> zero_optimization.stage 0 in zero0.json: must | --engine single:
--deepspeed batch.json -> --global-batch-size 8: must be a multiple of 1 process x 3 (--gradient-accumulation-steps)
--deepspeed no-zero.json --max-grad-norm 1 --learning-rate 0 \
-> zero_optimization.stage null in no-zero.json: must be 1, 2 or 3 | \
optimizer.type "Lamb" in no-zero.json: must be one of Adam, AdamW | \
--max-grad-norm 1: contradicts gradient_clipping 0.5 in no-zero.json | \
--learning-rate 0: must be above 0
--num-train-epochs 2 -> --num-train-epochs 2: cannot be used with --max-steps 12; remove one of the two
--warmup-steps 12 -> --warmup-steps 12: must be less than the run's 12 steps
--block-size 17 -> --block-size 17: --model gpt2 has only 16 positions
--per-device-train-batch-size 2 --gradient-accumulation-steps 3 \
-> --global-batch-size 8: must be 1 process x 2 (--per-device-train-batch-size) x 3 (--gradient-accumulation-steps) = 6
--config-overrides n_layer=many -> --config-overrides n_layer=many: n_layer must be a whole number
--config-overrides n_layer=2,n_head=2,n_embd=32,n_positions=16,vocab_size=10 \
-> --config-overrides vocab_size=10: the store's tokenizer has 97
--engine ddp -> --engine ddp: needs a launcher
--reduce-dtype bf16 -> --reduce-dtype bf16: has no effect, --engine auto is one process here
--reduce-dtype fp16 --engine fsdp -> --reduce-dtype fp16: small gradients would underflow without a loss scale
--reduce-dtype bf16 --engine fsdp --no-fsdp-reshard -> --no-fsdp-reshard: cannot be used with --reduce-dtype bf16
--residual-dtype bf16 -> --residual-dtype bf16: has no effect without --precision bf16; add it
--resume run -> --resume run: must be auto, never or a checkpoint
--output-dir a-file/run -> --output-dir a-file/run: a-file is a file; name a folder
--max-step 5 --learning-rate -1 -> --max-step: unknown option (did | --learning-rate -1: must be above 0
--engine foo --reduce-dtype bf16 --global-batch-size x --per-device-train-batch-size 3 --num-train-epochs 2 \
-> --engine foo: must be one of | \
--global-batch-size x: must be a whole | \
--num-train-epochs 2: cannot be used with --max-steps 12
--config none.toml --output-dir a-file -> --config none.toml: cannot be read | --output-dir a-file: is a file
--datset x --text-column y --data none -> --datset: unknown option (did | --text-column y: cannot be | --data none:
--config types.toml -> max_steps 1.5 in types.toml | wandb 1 in types.toml | model 7 in types.toml
--data none -> --data none: no such folder
--data a-file -> --data a-file: is no token store
--data no-store -> --data no-store: is no token store
--data foreign -> --data foreign: store.json has format mosaic-1, this
--data garbled-store -> --data garbled-store: store.json is damaged (KeyError: 'tokenizer')
--data truncated -> --data truncated: train.bin is damaged: 100 bytes, store.json says 818
--data damaged -> --data damaged: train.bin is damaged: id 65535
--data pipes -> --data pipes: cannot be read (pipes/store.json: no regular file)
--data short --block-size 8 -> --block-size 8: the train split has 8 tokens, too few for one block
--data no-validation --eval-steps 4 --early-stopping-patience 2 \
-> --eval-steps 4: has no effect, no-validation has no validation text | --early-stopping-patience 2: has no effect
--eval-steps 4 --early-stopping-patience 2 \
-> --early-stopping-patience 2: has no effect, the run has 3 validations; take 1 or less
--dataset demo --tokenizer gpt2 --no-append-eos --text-column body --workers 2 \
-> --dataset demo: cannot be used with --data store | --text-column body: cannot be used with --data store | \
--tokenizer gpt2: cannot be | --no-append-eos: cannot be | --workers 2: cannot be
--learning-rate -1 --max-steps 0 --model gpt3 --data none --engine ddp --resume nowhere --output-dir a-file \
-> --learning-rate -1 | --max-steps 0 | --model gpt3 | --data none | --engine ddp | --resume | --output-dir
"""

FINE_TUNE = r"""
--model gpt2-smal -> --model gpt2-smal: no such folder, and not one of distilgpt2, gpt2, gpt2-medium
--model gpt2x -> (did you mean gpt2?)
--model ./models/none -> --model ./models/none: no such folder
--model no-config -> --model no-config: has no config.json
--model bert -> --model bert: config.json says model_type 'bert'; wikift knows gpt2 models only
--model broken -> --model broken: config.json cannot be read
--model pipes -> --model pipes: config.json cannot be read ([Errno 22] no regular file
--model garbled -> --model garbled: config.json says n_layer 'two'
--model small-model -> --model small-model: has no model.safetensors
--config-overrides n_layer=2 -> --config-overrides n_layer=2: has no effect without --from-scratch
"""

TEXT = r"""
--dataset none.txt -> --dataset none.txt: no such file or folder
--dataset wikitext-103 -> --dataset wikitext-103: no such file, folder or dataset; did you mean wikitext-103-v1?
--dataset empty.txt -> empty.txt
--dataset blank.txt -> blank.txt
--dataset latin.txt -> latin.txt
--dataset rows.jsonl -> text
--dataset broken.jsonl -> broken.jsonl
--dataset good.txt --text-column body -> --text-column body: has no effect, good.txt
--dataset good.txt --dataset-config x -> --dataset-config x: has no effect, good.txt has no configurations
--dataset demo --dataset-config x -> --dataset-config x: --dataset demo has none
--dataset good.txt --validation-fraction 1 -> --validation-fraction 1: must be above 0 and below 1
--dataset good.txt --workers 0 -> --workers 0: must be 1 or more
--dataset good.txt --tokenizer train:abc -> --tokenizer train:abc: SIZE must be 257 tokens or more
--dataset good.txt --tokenizer no-config -> --tokenizer no-config: has no tokenizer
--dataset good.txt --tokenizer a-file -> --tokenizer a-file: is a file
--dataset none.txt --tokenizer train:x --workers 0 -> --dataset none.txt | --tokenizer train:x | --workers 0
"""

PREPARE = r"""
--out a-file -> --out a-file: is a file; name a folder
--out a-file/far/below -> --out a-file/far/below: a-file is a file, not a folder; name another folder
--out no-store -> --out no-store: is a folder that contains other files
--out foreign -> store.json has format mosaic-1, this version
--out text -> text: was made with other settings
--out new --dataset-nme x --seed -1 -> --dataset-nme: unknown option (did | --seed -1: must be 0 or more
--out no-store --dataset gone.txt --tokenizer ./gone --workers 0 --seed -1 --validation-fraction 1 --encoding hex \
-> --out no-store | --dataset gone.txt | --tokenizer ./gone | --workers 0 | --seed -1 | --validation-fraction 1 | \
--encoding hex
"""

CONSOLIDATE = r"""
--max-shard-size 0 -> RUN_OR_CHECKPOINT: is missing | --max-shard-size 0: must be a number
none -> none: no such folder
store -> store: is not a run's folder
run --step 5 -> --step 5: is not among the checkpoints of run: 4, 8, 12
run/checkpoints/step-00000004 --best --out new -> --best: has no effect
run --max-shard-size 5apples -> --max-shard-size 5apples: must be a number and KB
run --out a-file -> --out a-file: is a file; name a folder
run --out no-store -> --out no-store: contains files that wikift did not export
none --step 4 --best --max-shard-size x -> none: no such | --step 4: cannot be used with | --max-shard-size x: must
"""

EVALUATE = r"""
-> MODEL: required
run --split tset -> --split tset:
run --context 16 --stride 17 -> --stride 17: must be at most --context 16
run --stride 64 -> --stride 64: run has 32 positions
run --data store -> its tokenizer is not the one that made store
run --data none -> --data none: no such folder
gpt2 -> --data: required
no-config --data text -> no-config: has no config.json
a-file --data text -> a-file: is a file
bert --data text -> bert: config.json says model_type 'bert'
run --splt test --context 0 -> --splt: unknown option (did you mean --split?) | --context 0: must be 1 or more
run run -> run: is named twice
run --protocol lm-eval --stride 8 -> --stride 8: has no effect
run --protocol paper -> --protocol paper: needs the text, not only its tokens; name it with --dataset
run --text-column x -> --text-column x: has no effect without --dataset
run --dataset demo --data text -> --dataset demo: cannot be used with --data text
run --data one-token -> --data: no split of one-token has two tokens or more
runs/empty --data text -> runs/empty: has no checkpoint yet
store --data text -> store: has no config.json
"""

PLAN = r"""
--gpus 8 -> --gpus 8: no GPU is here to tell its memory; add --gpu-memory 80GB
--gpus 1 --gpu-memory much -> --gpu-memory much: must be a number and KB, MB
--gpus 8 --gpu-memory 80GB --mfu 0.4 -> --mfu 0.4: is a part of a GPU's peak
--gpus 8 --gpu-memory 80GB --mfu 0.4 --gpu H1 -> which is not known of H1
--gpus 2 --trial 5 --device cpu -> --gpus 2: cannot be used with --trial 5 | --device cpu: has no effect on GPUs
--find-lr -> --find-lr: there is no token store yet
"""

GENERATE = r"""
run --prompt a --prompts-file prompts-latin.txt -> --prompt a: cannot be used with --prompts-file | line 2 is not UTF-8
run --prompts-file none.txt -> --prompts-file none.txt: cannot be read
run --prompts-file . -> --prompts-file .: cannot be read
run --prompts-file prompts-empty.txt -> --prompts-file prompts-empty.txt: has no prompt in it
run --repetition-penalty 0.05 --temperature hot -> --temperature hot: must be a number | 0.05: must be
run --stop "" -> --stop: is empty
run --num-return-sequences 3 --temperature 0 -> all would be the same; raise the temperature
run --temperature 0 --top-k 9 --top-p 0.5 --seed 1 \
-> --top-k 9: has no effect at --temperature 0 | --top-p 0.5: has no effect | --seed 1: has no effect
a-file -> a-file: is a file
no-store -> no-store: has no config.json (there: notes.txt)
run/checkpoints/step-00000004 -> is a checkpoint; make a model of it first: wikift consolidate
gtp2 -> gtp2: no such folder, and no name of the Hub (did you mean gpt2?)
runs/small/hf -> runs/small/hf: is not there yet; make it: wikift consolidate runs/small
runs/empty -> has no checkpoint yet; train it first: wikift train --seed 3 --output-dir runs/empty
zzz/y/hf -> zzz/y/hf: no such folder, and no name of the Hub; train it first: wikift train --output-dir zzz/y
zzz/y/x -> zzz/y/x: no such folder, and no name of the Hub; train it first: wikift train --output-dir zzz/y/x
run -- --seed 1 -> --: settings after it are for training, and MODEL run
run --no-train -- --seed 1 -> --no-train: settings after -- are for training
"""

TABLES = {
    "train from scratch": ("train", FITS, TRAIN),
    "train a model": ("train", "--data store --block-size 8 --max-steps 2 --output-dir out", FINE_TUNE),
    "prepare text": ("prepare", "--tokenizer train:300 --out new --quiet", TEXT),
    "prepare": ("prepare", "--dataset good.txt --tokenizer train:300", PREPARE),
    "plan": ("plan", "", PLAN),
    "consolidate": ("consolidate", "", CONSOLIDATE),
    "evaluate": ("evaluate", "", EVALUATE),
    "generate": ("generate", "", GENERATE),
}


@pytest.mark.parametrize(("name", "line", "expected"), [case for name in TABLES for case in cases(name)])
def test_a_wrong_line_is_refused(refused: Any, name: str, line: str, expected: list[str]) -> None:
    command, defaults, _ = TABLES[name]
    refused(command, merged(defaults, line), *expected)


def test_prepare_verifies_every_byte(refused: Any) -> None:
    refused("prepare", "--verify --out truncated", "--out truncated: train.bin is damaged")
    refused("prepare", "--verify --out none", "--out none: no such folder")


def test_another_experiment_in_a_runs_folder(refused: Any) -> None:
    fits = merged(FITS, f"--config-overrides {SHAPE.replace('16', '32')} --block-size 16 --data text")
    refused(
        "train",
        merged(fits, "--output-dir run --seed 7 --global-batch-size 4 --max-steps 99"),
        "--seed 7: this run was started with 42",
        "--global-batch-size 4: this run was started with 8",
    )


AS_PROCESSES: list[tuple[str, str, int, list[str]]] = [  # command, line, processes that a launcher started, expected
    ("train", FITS, 3, ["--global-batch-size 8: must be a multiple of 3 processes; take 6 or 9"]),
    ("train", f"{FITS} --engine single", 2, ["--engine single: uses one process, but"]),
    ("consolidate", "run", 2, ["torchrun: started 2 processes"]),
    ("generate", "run --prompt a", 2, ["torchrun: started 2 processes"]),
]


@pytest.mark.parametrize(("command", "line", "ranks", "expected"), AS_PROCESSES)
def test_as_a_process(work: Path, command: str, line: str, ranks: int, expected: list[str]) -> None:
    before = listing(work)
    env = os.environ | {"RANK": "0", "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(ranks)}
    words = [sys.executable, str(LAUNCH / f"{command}.py"), *line.split()]
    done = subprocess.run(words, capture_output=True, text=True, cwd=work, env=env, timeout=60)
    check(done.returncode, done.stdout, done.stderr, expected)
    assert listing(work) == before
