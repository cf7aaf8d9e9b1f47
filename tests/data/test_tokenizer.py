"""Tokenizers: trained the same every time, read back by stock transformers, told apart by what decides ids."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.real import GPT2_TOKENIZER, ROOT, needs_data
from wikift.base.errors import UserError
from wikift.commands import prepare
from wikift.data import tokenizer
from wikift.data.store import open_store
from wikift.data.tokenizer import CONFIG, EOS, FILE, tokenizer_fingerprint

TEXTS = [
    f"The {animal} didn't see {n} of the {animal}s , and it 's fine .\n"
    for n in range(40)
    for animal in ("cat", "dög", "猫")
]
PROBE = "The cat isn't a dög<|endoftext|> 猫 😀\n\n  = Robert =  don't"


def test_training_depends_on_the_text_only(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.data.test_tokenizer import TEXTS;"
        "from wikift.data.tokenizer import train;"
        "print(train(TEXTS, 320, Path(sys.argv[1])).fingerprint)"
    )
    here = tokenizer.train(TEXTS, 320, tmp_path / "here")
    assert (here.vocab_size, here.eos_token_id, here.name) == (320, 0, "train:320")
    for number, threads in enumerate(("1", "7")):
        own = {"RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true", "PYTHONHASHSEED": threads}
        command, env = [sys.executable, "-c", code, str(tmp_path / str(number))], os.environ | own
        out = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True, timeout=100)
        assert out.stdout.strip() == here.fingerprint
        assert (tmp_path / str(number) / "tokenizer.json").read_bytes() == here.file.read_bytes()


def test_stock_transformers_reads_it_without_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import transformers

    saved = tokenizer.train(TEXTS, 320, tmp_path)
    transformers.utils.logging.enable_propagation()
    try:
        with warnings.catch_warnings(), caplog.at_level("WARNING"):
            warnings.simplefilter("error")
            stock = transformers.AutoTokenizer.from_pretrained(tmp_path)
    finally:
        transformers.utils.logging.disable_propagation()
    assert not caplog.records
    raw = Tokenizer.from_file(str(saved.file))
    for text in [PROBE, *TEXTS[:20]]:
        ids = stock(text)["input_ids"]
        assert ids == raw.encode(text, add_special_tokens=False).ids
        assert stock.decode(ids) == text
    assert (stock.eos_token, stock.eos_token_id, stock.bos_token_id) == (EOS, 0, 0)
    assert len(stock) == saved.vocab_size
    assert tokenizer_fingerprint(stock) == saved.fingerprint == tokenizer_fingerprint(raw)
    stock.save_pretrained(tmp_path / "again")
    assert tokenizer_fingerprint(tmp_path / "again") == saved.fingerprint


def test_the_vocabulary_is_that_of_the_text(tmp_path: Path) -> None:
    assert tokenizer.train(["ab"], 5000, tmp_path / "a").vocab_size == 258  # bytes, end of text, one merge
    assert tokenizer.train([], 5000, tmp_path / "b").vocab_size == 257
    runs = [tokenizer.train(["x" * n + " " + "=" * n + " ab"] * 2, 300, tmp_path / str(n)) for n in (1000, 300_000)]
    assert runs[0].fingerprint == runs[1].fingerprint, "runs without an end teach their beginning only"


def test_a_fingerprint_changes_with_what_decides_ids(tmp_path: Path) -> None:
    saved = tokenizer.train(TEXTS, 300, tmp_path)
    original = json.loads(saved.file.read_text())

    def changed(**parts: object) -> str:
        model = original["model"] | {key: value for key, value in parts.items() if key in ("merges", "vocab")}
        content = original | {key: value for key, value in parts.items() if key not in model} | {"model": model}
        return tokenizer_fingerprint(Tokenizer.from_str(json.dumps(content)))

    vocabulary, merges, (end,) = original["model"]["vocab"], original["model"]["merges"], original["added_tokens"]
    first, second = list(vocabulary)[50:52]
    changes: list[dict[str, object]] = [
        {"merges": merges[:-1]},
        {"merges": [*merges[:-2], merges[-1], merges[-2]]},
        {"vocab": {**vocabulary, first: vocabulary[second], second: vocabulary[first]}},
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {**original["pre_tokenizer"], "add_prefix_space": True}},
        {"added_tokens": []},
        {"added_tokens": [{**end, "lstrip": True}]},
        {"added_tokens": [end, {**end, "id": 300, "content": "[PAD]"}]},
    ]
    fingerprints = {saved.fingerprint, *(changed(**parts) for parts in changes)}
    assert len(fingerprints) == 1 + len(changes)
    assert changed() == saved.fingerprint


BROKEN = {  # files -> message
    "empty": ({}, r"has no tokenizer, .* \(there: nothing\); copy .*python -c '.*\"gpt2\", trust_remote_code=False\)"),
    "half": ({"vocab.json": "{}"}, r"has no tokenizer, .* \(there: vocab.json\)"),
    "bad": ({"tokenizer.json": '{"version": "1.0", "model"'}, r"cannot be loaded \(.+\); copy it again$"),
    "pointer": ({"tokenizer.json": "version https://git-lfs.github.com/spec/v1"}, "tokenizer.json is a Git LFS"),
    "sentencepiece": ({"spiece.model": "x", CONFIG: '{"tokenizer_class": "T5Tokenizer"}'}, "pip install sentencepiece"),
    "python": ({"vocab.json": '{"a</w>": 0, "<unk>": 1}', "merges.txt": "#version: 0.2\n",
                CONFIG: '{"tokenizer_class": "CTRLTokenizer"}'}, r"is a slow \(Python\) tokenizer \(CTRLTokenizer\)"),
    "no end": ({"vocab.txt": "[UNK]\n[SEP]\n[CLS]\n[PAD]\n[MASK]\na", CONFIG: '{"tokenizer_class": "BertTokenizer"}'},
               r"has no end-of-text .*python -c '.*t.eos_token = \"\[SEP\]\"; t.save_pretrained\(.*-copy"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_folder_that_is_no_tokenizer(kind: str, tmp_path: Path) -> None:
    files, message = BROKEN[kind]
    (folder := tmp_path / kind).mkdir()
    for name, content in files.items():
        (folder / name).write_text(content)
    with pytest.raises(UserError, match=f"^--tokenizer {folder}: .*{message}"):
        tokenizer.load_tokenizer(str(folder), tmp_path / "copy")
    with pytest.raises(UserError, match=f"^MODEL {folder}: .*{message}"):
        tokenizer_fingerprint(folder, setting="MODEL")
    assert not (tmp_path / "copy").exists()


# --- copies, and other kinds -----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tokenizer.train(TEXTS, 320, tmp_path / "mine").folder


def edit(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], object]:
    """A change of one of the JSON files."""

    def act(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return act


def older_spelling(folder: Path) -> None:
    """As in the repository gpt2 of the Hub: merges in one string, the class told by the model's type."""
    edit(FILE, lambda c: c["model"].update(merges=[" ".join(pair) for pair in c["model"]["merges"]]))(folder)
    edit(FILE, lambda c: c["added_tokens"][0].update(normalized=True))(folder)
    (folder / CONFIG).write_text('{"model_max_length": 1024}')
    (folder / "config.json").write_text('{"model_type": "gpt2"}')


def other_end(folder: Path) -> None:
    for file in (FILE, CONFIG):
        (folder / file).write_text((folder / file).read_text().replace(EOS, "<end>"))


AS_AUTO_TOKENIZER: dict[str, Callable[[Path], object]] = {
    "as it was trained": lambda folder: None,
    "the Hub's gpt2": older_spelling,
    "another end of text": other_end,
    "settings without effect": edit(CONFIG, lambda c: c.update(pad_token=None, errors="replace", model_max_length=77)),
    "a pad token": edit(CONFIG, lambda c: c.update(pad_token="<pad>")),
    "an added end that strips": edit(FILE, lambda c: c["added_tokens"][0].update(rstrip=True)),
    "a space before": edit(CONFIG, lambda c: c.update(add_prefix_space=True)),
    "a beginning put before": edit(CONFIG, lambda c: c.update(add_bos_token=True)),
    "another class": edit(CONFIG, lambda c: c.update(tokenizer_class="PreTrainedTokenizerFast")),
    "a normalizer": edit(FILE, lambda c: c.update(normalizer={"type": "Lowercase"})),
}


@pytest.mark.parametrize("kind", AS_AUTO_TOKENIZER)
def test_a_copy_is_what_auto_tokenizer_loads(kind: str, folder: Path, tmp_path: Path) -> None:
    before = tokenizer_fingerprint(folder)
    AS_AUTO_TOKENIZER[kind](folder)
    same_as_by_transformers(folder, tmp_path)
    if kind in ("as it was trained", "the Hub's gpt2", "settings without effect"):
        assert tokenizer_fingerprint(folder) == before


def same_as_by_transformers(source: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    stock = AutoTokenizer.from_pretrained(source)
    stock.save_pretrained(tmp_path / "stock")
    saved = tokenizer.load_tokenizer(str(source), tmp_path / "copy")
    for same in (stock, source, tmp_path / "stock", tmp_path / "copy"):
        assert tokenizer_fingerprint(same) == saved.fingerprint
    assert (saved.eos_token_id, saved.vocab_size) == (stock.eos_token_id, len(stock))
    copy = AutoTokenizer.from_pretrained(tmp_path / "copy")
    for name in ("special_tokens_map", "model_max_length", "padding_side", "truncation_side"):
        assert getattr(copy, name) == getattr(stock, name), name
    plain = Tokenizer.from_file(str(saved.file))
    for text in [PROBE, *TEXTS[:5], ""]:
        ids = stock(text, add_special_tokens=False)["input_ids"]
        assert copy(text, add_special_tokens=False)["input_ids"] == ids
        assert plain.encode(text, add_special_tokens=False).ids == ids
        assert copy.decode(ids) == stock.decode(ids)


@needs_data
def test_gpt2s_own_files(tmp_path: Path) -> None:
    same_as_by_transformers(GPT2_TOKENIZER, tmp_path)
    saved = tokenizer.load_tokenizer(str(GPT2_TOKENIZER), tmp_path / "again")
    assert (saved.vocab_size, saved.eos_token_id, saved.name) == (50257, 50256, "gpt2-tokenizer")
    assert saved.fingerprint == "13485082d0918b610bd3aac0cb7f930f02011c53503499278e89196b4b210695"  # of every store
    (tmp_path / "bare").mkdir()
    for name in ("vocab.json", "merges.txt"):  # and nothing else, which AutoTokenizer knows no class for
        shutil.copy(GPT2_TOKENIZER / name, tmp_path / "bare")
    assert tokenizer.load_tokenizer(str(tmp_path / "bare"), tmp_path / "c").fingerprint == saved.fingerprint
    (tmp_path / "bare" / "special_tokens_map.json").write_text(json.dumps({"eos_token": tokenizer.EOS}))  # of old
    assert tokenizer_fingerprint(tokenizer.by_transformers(str(tmp_path / "bare"))) == saved.fingerprint


def test_ids_that_the_saved_file_would_not_return_are_refused(folder: Path, tmp_path: Path) -> None:
    edit(CONFIG, lambda c: c.update(split_special_tokens=True))(folder)
    with pytest.raises(UserError, match=r"split text in another way than tokenizer\.json; remove that setting"):
        tokenizer.load_tokenizer(str(folder), tmp_path / "copy")


def unigram() -> Tokenizer:  # T5's kind
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.normalizer = normalizers.NFKC()
    made.train_from_iterator(TEXTS, trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>"))
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return made


def word_piece() -> Tokenizer:  # BERT's kind
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIAL))
    return made


def llama() -> Tokenizer:
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, special_tokens=special))
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    return made


SPECIAL = ["<unk>", "</s>", "<s>"]
OTHERWISE: dict[Any, dict[str, Any]] = {
    unigram: {"unk_id": None}, word_piece: {"unk_token": "</s>"}, llama: {"fuse_unk": False}
}  # fmt: skip


@pytest.mark.parametrize("kind", [unigram, word_piece, llama])
def test_tokenizers_of_other_kinds(kind: Callable[[], Tokenizer], tmp_path: Path) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(tokenizer_object=kind(), unk_token="<unk>", eos_token="</s>", bos_token="<s>")
    made.save_pretrained(tmp_path / "made")
    (tmp_path / "in").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "in" / f"{split}.txt").write_text("".join(TEXTS))
    command = ["--dataset", tmp_path / "in", "--tokenizer", tmp_path / "made", "--out", tmp_path / "out", "--quiet"]
    assert prepare.main([str(word) for word in command]) == 0
    store = open_store(tmp_path / "out", verify=True)
    assert (store.eos_token_id, store.vocab_size) == (1, len(made))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    ids = [i for text in TEXTS for i in theirs(text, add_special_tokens=False)["input_ids"]]
    assert store.tokens("train").tolist() == ids
    assert tokenizer_fingerprint(tmp_path / "made") == tokenizer_fingerprint(theirs) == store.tokenizer_fingerprint
    edit(FILE, lambda content: content["model"].update(OTHERWISE[kind]))(tmp_path / "made")
    assert tokenizer_fingerprint(tmp_path / "made") != store.tokenizer_fingerprint
