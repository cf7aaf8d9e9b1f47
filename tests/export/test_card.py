"""The model card. Run: pytest tests/export/test_card.py"""

from __future__ import annotations

import json
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from transformers.utils import logging as transformers_logging

from tests.tiny import metrics
from wikift.commands.consolidate import main


def card_of(run: Path, *words: str) -> tuple[dict[str, Any], str]:
    """The card's front matter, as the Hub reads it, and its text."""
    assert main([str(run), "--quiet", *words]) == 0
    card = ModelCard.load(run / "hf" / "README.md")
    return card.data.to_dict(), card.text


def record(run: Path, **changes: Any) -> None:
    """Change what config.json says of the run."""
    config = json.loads((run / "config.json").read_text())
    for key, change in changes.items():
        config[key] = {**config[key], **change} if isinstance(change, dict) else change
    (run / "config.json").write_text(json.dumps(config))


def test_the_card_tells_the_run(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    record(run, command=None)
    data, body = card_of(run)
    for values in metrics(run):
        if "eval_loss" in values:
            losses = f"{values['loss']:.4f} | {values['eval_loss']:.4f}"
            perplexities = f"{values['eval_perplexity']:,.2f} | {values['eval_word_perplexity']:,.2f}"
            assert f"| {values['step']} | {values['tokens']:,} | {losses} | {perplexities} |" in body
    config = json.loads((run / "config.json").read_text())
    for text in ("| learning rate | 0.01 |", "| seed | 42 |", "| global batch size | 8 |", "| sentences.txt |",
                 config["store"]["tokenizer"]["fingerprint"], "Trained from scratch on sentences.txt"):  # fmt: skip
        assert text in body
    assert data["library_name"] == "transformers"
    assert not {"base_model", "license", "datasets", "language"} & set(data), "unknown for a text of one's own"
    assert "## Reproduce" not in body, "the run recorded no command"
    # the lines that load it
    code = body.split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) == 4
    (run / "use.py").write_text(code)
    monkeypatch.chdir(run / "hf")
    capsys.readouterr()
    transformers_logging.set_verbosity_error()
    runpy.run_path(str(run / "use.py"))
    assert capsys.readouterr().out.startswith("The Renaissance was")


def test_the_hub_shows_the_validation_of_these_weights(run: Path) -> None:
    name, hub_name = "wikitext-2-v1", "Salesforce/wikitext"
    record(run, settings={"model": "gpt2", "from_scratch": False}, commits={"gpt2": "a" * 40},
           store={"dataset": name, "dataset_config": name, "dataset_name": hub_name})  # fmt: skip
    data, body = card_of(run, "--step", "8")
    assert "gpt2 fine-tuned on wikitext-2-v1 with" in body
    assert f"| commit of gpt2 | {'a' * 40} |" in body
    expected = {"base_model": "openai-community/gpt2", "license": "mit", "datasets": [hub_name],
                "language": "en", "metrics": ["perplexity"], "pipeline_tag": "text-generation"}  # fmt: skip
    assert {key: data[key] for key in expected} == expected
    (model,) = data["model-index"]
    (result,) = model["results"]
    assert model["name"] == "small"
    assert result["task"]["type"] == "text-generation"
    assert result["dataset"] == {"name": name, "type": hub_name, "config": name, "split": "validation"}
    (values,) = (values for values in metrics(run) if values["step"] == 8)
    kinds = {"loss": "eval_loss", "perplexity": "eval_perplexity", "word_perplexity": "eval_word_perplexity"}
    assert {metric["type"]: metric["value"] for metric in result["metrics"]} == {
        kind: pytest.approx(values[key], abs=1e-4) for kind, key in kinds.items()
    }
    # of a step that was not validated the Hub shows nothing
    kept = [values for values in metrics(run) if values["step"] != 8]
    (run / "metrics.jsonl").write_text("".join(json.dumps(values) + "\n" for values in kept))
    data, body = card_of(run, "--step", "8")
    assert "model-index" not in data
    assert "This step was not validated" in body


def test_nothing_that_the_card_quotes_breaks_it(run: Path) -> None:
    odd = "it's\n---\n# a `b` | <i> [c](d) _e_ &lt; \x1b[1m"
    command = "wikift train \\\n  --dataset '" + odd + "\n```\n# ````'"
    record(run, command=command, store={"dataset": odd}, settings={"output_dir": odd})
    renamed = run.with_name(odd.replace("/", ""))
    run.rename(renamed)
    data, body = card_of(renamed)
    flat = " ".join(odd.split())
    assert data["model-index"][0]["name"] == flat
    assert data["model-index"][0]["results"][0]["dataset"]["name"] == flat
    export = f"wikift consolidate {shlex.quote(odd)} --step 12 --dtype float32"
    code = f"{command}\n{export}".replace("\x1b", r"\x1b")
    assert f"\n`````\n{code}\n`````\n" in body
    outside = body.replace(code, "")
    headings = [line for line in outside.splitlines() if line.startswith("#")]
    shown = r"it's --- # a \`b\` \| \<i\> \[c\](d) \_e\_ \&lt; \x1b\[1m"
    sections = ("Validation", "Use", "Data", "Training", "Reproduce")
    assert headings == [f"# {shown}", *(f"## {name}" for name in sections)]
    assert f"| dataset | {shown} |" in outside


def test_the_cards_curve_ends_at_its_step_and_is_thinned(run: Path) -> None:
    _, body = card_of(run, "--step", "4")
    assert "| 4 | 512 |" in body
    assert "| 8 | 1,024 |" not in body
    assert "step 4, 512 tokens seen" in body
    rows = [{"step": 12 - k, "tokens": 1, "eval_loss": 1.0 + (k != 7)} for k in range(50, -1, -1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = [int(step) for step in re.findall(r"^\| (-?\d+) \| 1 \|", card_of(run)[1], flags=re.MULTILINE)]
    assert 17 <= len(shown) <= 21
    assert {12, 5} < set(shown), "the last and the best"
    assert "the lowest loss was at step 5" in card_of(run)[1]
