"""Prompts to text: the stream, one answer, files of prompts. Run: pytest tests/commands/test_generate.py"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from tests.terminal import GENERATE, SCRIPT, Terminal
from tests.tiny import arguments, until
from tests.trained import text_store
from wikift.base import folders
from wikift.base.errors import UserError
from wikift.commands.generate import main
from wikift.data.tokenizer import train
from wikift.generation import prompts
from wikift.generation.sampler import Sampling
from wikift.generation.stream import Stream
from wikift.generation.writer import Answer, Writer, load_writer

ROOT = Path(__file__).resolve().parents[2]
SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0}


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 257 byte tokens whose position decides the next token: it writes SCRIPT, byte by byte, and ends."""
    folder = tmp_path_factory.mktemp("scripted")
    saved = train([], 257, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [*tokenizer(SCRIPT)["input_ids"], saved.eos_token_id]
    size = saved.vocab_size
    config = GPT2Config(
        n_layer=1, n_head=1, n_embd=size, vocab_size=size, n_positions=64, bos_token_id=saved.eos_token_id,
        eos_token_id=saved.eos_token_id,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "c_proj" in name:  # attention and MLP add nothing
                parameter.zero_()
        model.transformer.wte.weight.copy_(torch.eye(size))
        model.transformer.wpe.weight.zero_()
        model.transformer.wpe.weight[range(len(ids)), ids] = 10.0
    model.save_pretrained(folder)
    return folder


def writer_of(folder: Path) -> Writer:
    return load_writer(str(folder), "cpu")


def alone(writer: Writer, prompt: str, sampling: Sampling, number: int, **callbacks: Any) -> Answer:
    return writer.answers([(number, prompt)], sampling, **callbacks)[0]


def asked(**values: Any) -> Sampling:
    return Sampling(**{"temperature": 0.8, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.1, **values})


# --- one answer ----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=12), cut=st.integers(0, 60))
def test_the_stream_writes_whole_characters_as_soon_as_they_are(scripted_tokenizer: Any, text: str, cut: int) -> None:
    ids = scripted_tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode()), "a token is a byte"
    written: list[str] = []
    stream = Stream(scripted_tokenizer, written.append)
    for count, token in enumerate(ids[:cut], 1):
        stream.take(token)
        # all that is whole by now, and nothing of a character begun; a real U+FFFD waits for what follows it
        whole = text.encode()[:count].decode(errors="ignore").removesuffix("\ufffd")
        assert "".join(written) == whole == stream.text
    assert stream.finish() == stream.text == "".join(written)


@pytest.fixture(scope="module")
def scripted_tokenizer(scripted: Path) -> Any:
    return AutoTokenizer.from_pretrained(scripted)


@settings(max_examples=100, deadline=None)
@given(text=st.text("ab—", max_size=12), stop=st.lists(st.text("ab—", min_size=1, max_size=3), min_size=1, max_size=2))
def test_nothing_of_a_stop_string_is_ever_written(scripted_tokenizer: Any, text: str, stop: list[str]) -> None:
    written: list[str] = []
    stream = Stream(scripted_tokenizer, written.append, stop)
    for token in scripted_tokenizer(text)["input_ids"]:
        stream.take(token)
        if stream.stopped:
            break
        sofar = "".join(written)
        assert not any(found in sofar for found in stop)
    # the first end of a stop string ends the text, at the earliest beginning of one that is there by then
    ends = [place + len(found) for found in stop if (place := text.find(found)) >= 0]
    expected = (
        text if not ends else text[: min(place for found in stop if (place := text[: min(ends)].find(found)) >= 0)]
    )
    assert stream.finish() == "".join(written) == expected
    assert stream.stopped == bool(ends)


@pytest.mark.parametrize("temperature", ["0", "0.8"])
def test_a_scripted_model_is_quoted_to_its_end(
    scripted: Path, capsys: pytest.CaptureFixture[str], temperature: str
) -> None:
    words = [str(scripted), "--prompt", "", "--temperature", temperature, "--max-new-tokens", "60", "--device", "cpu"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["text"] == SCRIPT
    assert found["finish_reason"] == "stop"
    assert found["new_tokens"] == len(SCRIPT.encode()) + 1
    assert found["prompt"] == ""
    assert found["seconds"] > 0
    used = [found[name] for name in ("temperature", "top_k", "top_p", "repetition_penalty", "seed")]
    assert used == ([0.0, 0, 1.0, 1.0, 42] if temperature == "0" else [0.8, 50, 0.95, 1.1, 42])
    assert main(words) == 0
    assert capsys.readouterr().out == SCRIPT + "\n"
    cut = len("Hänsch — 東".encode()) - 1  # inside of a character
    words[words.index("60")] = str(cut)
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["text"], found["new_tokens"], found["finish_reason"]) == ("Hänsch — ", cut, "length")


def test_same_seed_same_text(made: Path) -> None:
    writer = writer_of(made / "hf")
    one = [alone(writer, "The", asked(seed=3, max_new_tokens=12), number).text for number in range(3)]
    two = [alone(writer, "The", asked(seed=3, max_new_tokens=12), number).text for number in (2, 1, 0)][::-1]
    assert one == two
    assert len({*one, alone(writer, "The", asked(seed=4, max_new_tokens=12), 0).text}) == 4
    greedy = {alone(writer, "The", asked(seed=seed, temperature=0, max_new_tokens=12), 0).text for seed in (1, 2)}
    assert len(greedy) == 1
    # settings at their ends still give text
    for extreme in ({"temperature": 1e-30}, {"temperature": 1e30}, {"top_k": 10**6, "top_p": 1.0}, {"top_p": 1e-9}):
        assert alone(writer, "The", asked(max_new_tokens=4, **extreme), 0).new_tokens > 0
    assert (
        alone(writer, "The", asked(max_new_tokens=12, top_k=1), 0).text
        == alone(writer, "The", asked(max_new_tokens=12, temperature=0), 0).text
    )


@pytest.mark.parametrize("penalty", [None, 1.7])
def test_temperature_0_is_generate_without_sampling(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], penalty: float | None
) -> None:
    """The command's own defaults are those of drawing: none of them may act here, unlike a penalty that was typed."""
    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(**SHAPE, vocab_size=320, initializer_range=0.3)).eval()
    tokenizer = AutoTokenizer.from_pretrained(made / "hf")
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path)
    words = [str(tmp_path), "--temperature", "0", "--max-new-tokens", "30", "--json", "--device", "cpu"]
    typed = [] if penalty is None else ["--repetition-penalty", str(penalty)]
    texts = []
    for prompt in ("The Renaissance", "Maria", "The theory of relativity describes space and time"):
        ids = tokenizer(prompt, return_tensors="pt")
        wanted = {} if penalty is None else {"repetition_penalty": penalty}
        new = model.generate(**ids, do_sample=False, max_new_tokens=30, pad_token_id=0, **wanted)[0]
        expected = tokenizer.decode(new[ids["input_ids"].shape[1] :], skip_special_tokens=True).removesuffix("\ufffd")
        capsys.readouterr()
        assert main([*words, *typed, "--prompt", prompt]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["text"], found["repetition_penalty"]) == (expected, penalty or 1.0)
        texts.append(expected)
        if penalty is None:  # the case is one in which the default of drawing would tell
            assert main([*words, "--repetition-penalty", "1.1", "--prompt", prompt]) == 0
            texts.append(json.loads(capsys.readouterr().out)["text"])
    assert len(set(texts)) > len(texts) // 2


def test_what_does_not_fit_the_context_is_said(made: Path) -> None:
    torch.manual_seed(1)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=64, vocab_size=320, initializer_range=0.5)
    # weights so large that every token of the prompt tells in the text
    writer = Writer(GPT2LMHeadModel(config).eval(), AutoTokenizer.from_pretrained(made / "hf"))
    notes: list[str] = []
    long = "Steam engines drove the Industrial Revolution . " * 10 + "Maria studied in Paris"
    count = len(writer.tokenizer(long)["input_ids"])
    cut = alone(writer, long, asked(max_new_tokens=10), 0, note=notes.append)
    assert notes == [f"the prompt has {count} tokens, the model's context is 64: only its last 54 tokens are used"]
    assert (cut.prompt_tokens, cut.new_tokens) == (count, 10)
    assert alone(writer, "Paris" + long, asked(max_new_tokens=10), 0).text == cut.text, "it is the end that is kept"
    assert alone(writer, long + "Paris", asked(max_new_tokens=10), 0).text != cut.text


def test_a_published_models_own_sampling_does_not_mix_in(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(made / "hf", tmp_path / "other")
    odd = {"do_sample": True, "temperature": 9.0, "max_length": 7, "no_repeat_ngram_size": 1}
    config = json.loads((other / "generation_config.json").read_text())
    (other / "generation_config.json").write_text(json.dumps({**config, **odd}))
    texts = []
    for folder in (made / "hf", other):
        assert main([str(folder), "--prompt", "The", "--temperature", "0", "--json", "--device", "cpu"]) == 0
        out, err = capsys.readouterr()
        texts.append(json.loads(out)["text"])
        assert all(line.startswith("wikift: ") for line in err.splitlines()), "no library speaks on the terminal"
        assert err.startswith(f"wikift: loading {folder} ...\n"), "before the seconds that torch takes"
    assert texts[0] == texts[1]


def test_tokenizer_and_model_must_belong_together(made: Path, tmp_path: Path) -> None:
    model = shutil.copytree(made / "hf", tmp_path / "model")
    (model / "wikift.json").unlink()  # whose checksums would tell first
    assert train([f"word{number * 7919}" for number in range(500)], 400, model).vocab_size == 400
    with pytest.raises(UserError, match="do not match"):
        main([str(model), "--prompt", "a"])


# --- prompts -------------------------------------------------------------------------------------------------------


def test_a_file_of_prompts(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffHänsch \r\n\n   \n東京\nlast".encode())
    words = [str(made), "--prompts-file", str(file), "--max-new-tokens", "3", "--device", "cpu"]
    assert main([*words, "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["prompt"] for answer in found] == ["Hänsch ", "東京", "last"]
    assert main(words) == 0
    expected = "\n".join(f"{answer['prompt']}{answer['text']}\n" for answer in found)
    assert capsys.readouterr().out == expected
    assert main([*words, "--quiet"]) == 0
    assert capsys.readouterr() == ("\n".join(f"{answer['text']}\n" for answer in found), "")


def test_batches_come_back_in_order_and_each_as_alone(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked_for = ["Physics " * size + "in Paris" for size in (9, 0, 5, 1, 30, 2)]
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(asked_for))
    words = [str(made), "--prompts-file", str(file), "--max-new-tokens", "9", "--device", "cpu", "--json"]
    answers = []
    for size in ("1", "4"):
        assert main([*words, "--batch-size", size]) == 0
        out, err = capsys.readouterr()
        answers.append([{**json.loads(line), "seconds": 0} for line in out.splitlines()])
        assert re.search(r"^wikift: 6 prompts, 54 tokens in .* tokens/s$", err, re.M)
    assert answers[0] == answers[1]
    assert [answer["prompt"] for answer in answers[0]] == asked_for
    assert [answer["prompt_tokens"] for answer in answers[0]] == [
        len(writer_of(made / "hf").tokenizer(p)["input_ids"]) for p in asked_for
    ]


def test_stop_strings_and_several_sequences(scripted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(scripted), "--prompt", "", "--device", "cpu", "--max-new-tokens", "60"]
    assert main([*words, "--stop", "nothing", "--stop", "…\\n", "--stop=京", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["text"], found["finish_reason"]) == ("Hänsch — 東", "stop_string")
    assert found["stop"] == ["nothing", "…\n", "京"]
    assert found["new_tokens"] == len("Hänsch — 東京".encode())
    assert main([*words, "--stop", "\\n"]) == 0
    assert capsys.readouterr().out == SCRIPT.partition("\n")[0] + "\n"
    assert main([*words, "--num-return-sequences", "2", "--quiet"]) == 0
    assert capsys.readouterr().out == f"{SCRIPT}\n\n{SCRIPT}\n"


def test_the_five_examples(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(made), "--examples", "--json", "--max-new-tokens", "2", "--device", "cpu"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["prompt"] for answer in found] == list(prompts.EXAMPLES)
    subjects = ("Theodor W. Hänsch", "Renaissance", "Marie Curie", "Industrial Revolution", "theory of relativity")
    for subject, prompt in zip(subjects, prompts.EXAMPLES, strict=True):
        assert subject in prompt
    assert all(word in prompts.EXAMPLES[0] for word in ("2005", "precision spectroscopy", "optical frequency comb"))


def test_the_newest_run_is_the_default(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert folders.newest_run() is None
    (tmp_path / "runs" / "unfinished").mkdir(parents=True)
    (tmp_path / "runs" / "unfinished" / "config.json").write_bytes((made / "config.json").read_bytes())
    for name, age in (("old", 100), ("new", 50)):
        for copy in shutil.copytree(made, tmp_path / "runs" / name).rglob("*.*"):
            os.utime(copy, (time.time() - age,) * 2)
    assert folders.newest_run() == Path("runs/new")
    assert main(["--prompt", "a", "--max-new-tokens", "1", "--json", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "runs/new/hf"
    # an export older than the run's newest checkpoint answers, and says so
    record = Path("runs/new/hf/wikift.json")
    record.write_text(json.dumps({**json.loads(record.read_text()), "step": 8}))
    assert main(["--prompt", "a", "--max-new-tokens", "1", "--device", "cpu"]) == 0
    assert "runs/new/hf is of step 8, the run has come to 12" in capsys.readouterr().err


# --- no model yet --------------------------------------------------------------------------------------------------


def training(folder: Path, **values: Any) -> list[str]:
    """Arguments of a training into runs/new."""
    text_store(folder / "store")
    shape = "n_layer=2,n_head=2,n_embd=32,n_positions=32"
    return arguments(folder / "store", Path("runs/new"), config_overrides=shape, block_size=16, **values)


def test_training_comes_first_where_no_model_is_named_and_none_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    wrong = training(tmp_path, learning_rate=-1, dropout=2)
    for words, expected in (
        (["--no-train"], ["no trained model yet", "wikift train\n", "wikift generate runs/gpt2-wikitext-2-v1"]),
        (["--prompt", "The", "--", *wrong], ["--learning-rate -1", "--dropout 2"]),
        (["--prompt", "The", "--", *training(tmp_path), "--dry-run"], ["left no checkpoint"]),
    ):
        with pytest.raises(UserError) as raised:
            main(words)
        assert all(part in str(raised.value) for part in expected), words
    capfd.readouterr()
    words = ["--prompt", "The", "--json", "--device", "cpu", "--", *training(tmp_path, quiet=False)]
    assert main(words) == 0
    out, err = capfd.readouterr()
    found = json.loads(out)  # the training's own words went to standard error
    assert found["model"] == "runs/new/hf"
    assert "no trained model yet" in err
    assert "wikift train --data" in err
    assert "step 12/12" in err
    assert folders.checkpoint_steps(Path("runs/new"))[-1] == 12
    assert main(words) == 0  # again: it is there
    again, err = capfd.readouterr()
    assert json.loads(again)["text"] == found["text"]
    assert "has a model: no training" in err
    for path in (tmp_path / "store").glob("train*"):
        path.unlink()
    os.rename("runs", "elsewhere")
    assert main(words) == 2, "the training's own exit code"


def test_a_stopped_training_is_saved_and_its_exit_code_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--prompt", "The", "--json", "--device", "cpu", "--"]
    long = training(tmp_path, max_steps=10**6, save_steps=10**6, eval_steps=10**6)
    child = subprocess.Popen(
        [*GENERATE, *words, *long], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    metrics = Path("runs/new/metrics.jsonl")
    until(lambda: metrics.exists() and metrics.stat().st_size, child)
    child.send_signal(signal.SIGTERM)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 75, err
    assert out == b""
    assert b"training was interrupted and saved; resume it" in err
    assert len(folders.checkpoint_steps(Path("runs/new"))) == 1


def test_on_a_terminal_it_asks_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    terminal = Terminal([*GENERATE, "--prompt", "a"])
    terminal.wait_for(r"train it now\? \[Y/n\] ")
    terminal.send("n\n")
    terminal.wait_for(r"python \S*launch/generate.py runs/gpt2-wikitext-2-v1")
    assert terminal.exit_code() == 2
    assert list(tmp_path.iterdir()) == []
