"""The model card (README.md of an export), made from what the run recorded. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from pathlib import Path
from typing import Any

from wikift.base.names import WIKITEXT
from wikift.base.shape import released_name
from wikift.settings.fields import TrainSettings
from wikift.settings.options import flag

_CURVE_ROWS = 20
_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForCausalLM.from_pretrained(".")
inputs = tokenizer("The Renaissance was", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens={new_tokens}, do_sample=True)[0]))
```"""
# These place or watch the work; they do not change what comes out.
_WITHOUT_EFFECT = {
    "quiet",
    "dry_run",
    "resume",
    "wandb",
    "config",
    "workers",
    "device",
    "logging_steps",
    "save_total_limit",
}


@dataclasses.dataclass(frozen=True)
class Mean:
    """Of which steps the weights are the mean, and a sentence that says whether that was better."""

    steps: list[int]
    verdict: str


def model_card(
    run: Path, config: dict[str, Any], manifest: dict[str, Any], dtype: str, mean: Mean | None = None
) -> str:
    """The card of the checkpoint that `manifest` describes, or of a mean up to it; `config` is the run's."""
    settings, store = config["settings"], config.get("store") or {}
    name = run.absolute().name
    curve = [values for values in _metrics(run) if values["step"] <= manifest["step"]]
    origin = "trained from scratch" if settings["from_scratch"] else f"{settings['model']} fine-tuned"
    summary = (
        f"{origin[0].upper() + origin[1:]} on {_dataset(settings, store)} with wikift {config['wikift']}; "
        f"step {manifest['step']:,}, {manifest.get('tokens', 0):,} tokens seen, weights in {dtype}."
    )
    derived = config.get("derived") or {}
    train = command_of(settings, (derived.get("place") or {}).get("ranks", 1))
    which = f"--step {manifest['step']}" if mean is None else f"--average-last {len(mean.steps)}"
    again = f"python launch/consolidate.py {settings['output_dir']} {which} --dtype {dtype}"
    scores = _scores(curve, manifest)
    if mean is not None:
        summary += f" The weights are the mean of those of steps {', '.join(map(str, mean.steps))}."
        scores = f"{mean.verdict}\n\nThe checkpoints: {scores[0].lower()}{scores[1:]}"
    parts = [
        _front_matter(settings, store),
        f"# {name}\n\n{summary}",
        "## Scores\n\n" + scores,
        "## Use\n\n"
        + _USE.replace("{new_tokens}", str(min(64, manifest["model_config"].get("n_positions", 1024) // 2))),
        "## Data\n\n" + _data(store),
        "## Training\n\n" + _training(settings, derived),
        "## Validation\n\n" + _curve(curve),
        f"## Again\n\n```\n{train}\n{again}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def peer_card(name: str, checkpoint: str, kind: str, facts: dict[str, Any], config: dict[str, Any]) -> str:
    """The card of a model out of a checkpoint of another tool (`kind`), of which `facts` is all that is known."""
    origin = f"The weights of `{checkpoint}`, a {kind} checkpoint, made a Hugging Face directory by wikift"
    known = {**facts, **{key: config.get(key) for key in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")}}
    rows = [_row(key, _plain(value)) for key, value in {**known, "dtype": config["dtype"]}.items() if value is not None]
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [gpt2, wikift]\n---",
        f"# {name}\n\n{origin}. How they were trained is not recorded there.",
        "## Use\n\n" + _USE.replace("{new_tokens}", str(min(64, config["n_positions"] // 2))),
        "## Origin\n\n" + "\n".join([_row("", ""), _row("---", "---:"), *rows]),
    ]
    return "\n\n".join(parts) + "\n"


def command_of(settings: dict[str, Any], ranks: int) -> str:
    """The train command with these (recorded) settings, defaults left out."""
    words = [f"torchrun --nproc_per_node={ranks} launch/train.py" if ranks > 1 else "python launch/train.py"]
    for field in dataclasses.fields(TrainSettings):
        value = settings.get(field.name, field.default)
        if value == field.default or field.name in _WITHOUT_EFFECT or value is None:
            continue
        if isinstance(value, bool):
            words.append(flag(field.name) if value else flag("no_" + field.name))
        else:
            words.append(f"{flag(field.name)} {shlex.quote(f'{value:g}' if isinstance(value, float) else str(value))}")
    return " \\\n  ".join(words)


def _front_matter(settings: dict[str, Any], store: dict[str, Any]) -> str:
    lines = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [gpt2, wikift]"]
    base = released_name(settings["model"])
    if base is not None and not settings["from_scratch"]:
        lines.append(f"base_model: {'distilbert' if base == 'distilgpt2' else 'openai-community'}/{base}")
    if store.get("dataset") in WIKITEXT:
        lines += ["language: en", "datasets: [Salesforce/wikitext]"]
    return "---\n" + "\n".join(lines) + "\n---"


def _dataset(settings: dict[str, Any], store: dict[str, Any]) -> str:
    name = str(store.get("dataset") or settings.get("dataset") or settings.get("data"))
    config = store.get("dataset_config")
    return (Path(name).name or name) + (
        f" ({config})" if config else ""
    )  # a path of this machine's means nothing elsewhere


def _scores(curve: list[dict[str, Any]], manifest: dict[str, Any]) -> str:
    scored = [values for values in curve if _number(values.get("eval_loss")) is not None]
    if not scored:
        return "This checkpoint was not validated."
    best = min(scored, key=lambda values: float(values["eval_loss"]))
    lines = [_row("", "step", "loss", "perplexity", "word perplexity"), _row("---", "---:", "---:", "---:", "---:")]
    for label, values in (("last", scored[-1]), ("best", best)):
        lines.append(_row(label, f"{values['step']:,}", *_scored(values)))
    note = "" if scored[-1]["step"] == manifest["step"] else "\n\nThis step itself was not validated."
    return "On the validation split:\n\n" + "\n".join(lines) + note


def _data(store: dict[str, Any]) -> str:
    facts = [
        (key, value)
        for key, value in store.items()
        if isinstance(value, (str, int, float, bool)) and key not in ("format", "wikift", "dataset_path")
    ]
    tokenizer = store.get("tokenizer")
    if isinstance(tokenizer, dict):
        facts += [(f"tokenizer {key}", value) for key, value in tokenizer.items() if isinstance(value, (str, int))]
    names = {"dataset", "tokenizer name"}
    lines = [_row("", ""), _row("---", "---")]
    lines += [_row(key.replace("_", " "), _plain(Path(str(v)).name if key in names else v)) for key, v in facts]
    lines += ["", _row("split", "rows", "tokens", "words", "bytes"), _row("---", "---:", "---:", "---:", "---:")]
    for name, split in store.get("splits", {}).items():
        lines.append(_row(name, *(f"{split.get(key, 0):,}" for key in ("rows", "tokens", "words", "bytes"))))
    return "\n".join(lines)


def _training(settings: dict[str, Any], derived: dict[str, Any]) -> str:
    hidden = _WITHOUT_EFFECT | {"output_dir", "data", "dataset", "tokenizer"}
    facts = {key: value for key, value in settings.items() if value is not None and key not in hidden}
    flat = {**derived, **derived.get("place", {}), **derived.get("shape", {})}
    facts |= {key: value for key, value in flat.items() if isinstance(value, (str, int, float, bool))}
    lines = [_row("setting", "value"), _row("---", "---")]
    return "\n".join(lines + [_row(key.replace("_", " "), _plain(value)) for key, value in facts.items()])


def _curve(curve: list[dict[str, Any]]) -> str:
    scored = [values for values in curve if _number(values.get("eval_loss")) is not None]
    if not scored:
        return "None was made."
    stride = math.ceil(len(scored) / _CURVE_ROWS)
    shown = scored[::-1][::stride][::-1]  # the last one always
    head = ("step", "tokens", "training loss", "validation loss", "perplexity", "word perplexity")
    lines = [_row(*head), _row(*["---:"] * len(head))]
    for values in shown:
        tokens, loss = values.get("tokens"), _number(values.get("loss"))
        first = (f"{values['step']:,}", "" if tokens is None else f"{tokens:,}", "" if loss is None else f"{loss:.4f}")
        lines.append(_row(*first, *_scored(values)))
    return "\n".join(lines)


def _scored(values: dict[str, Any]) -> tuple[str, str, str]:
    perplexities = (_number(values.get(key)) for key in ("eval_perplexity", "eval_word_perplexity"))
    first, second = ("" if value is None else f"{value:,.2f}" for value in perplexities)
    return f"{float(values['eval_loss']):.4f}", first, second


def _metrics(run: Path) -> list[dict[str, Any]]:
    from wikift.watch.log import read_metrics

    return read_metrics(run / "metrics.jsonl")


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _plain(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else json.dumps(value) if isinstance(value, bool) else str(value)
    return " ".join(text.split()).replace("|", "\\|")
