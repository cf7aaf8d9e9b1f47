"""The model card (README.md of an export), made from what the run recorded; the Hub reads its front matter."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from wikift.base.console import printable
from wikift.base.files import read_jsonl
from wikift.base.folders import METRICS
from wikift.base.shape import released_name

_CURVE_ROWS = 20
_USE = """from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForCausalLM.from_pretrained(".")
inputs = tokenizer("The Renaissance was", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens={new_tokens}, do_sample=True)[0]))"""
# Settings that place or show the work, or are paths of this machine: they mean nothing elsewhere
_HIDDEN = {"quiet", "dry_run", "resume", "wandb", "report_to", "config", "workers", "device", "logging_steps",
           "save_total_limit", "output_dir", "data", "dataset", "tokenizer", "sample_prompts"}  # fmt: skip
_SCORES = {"eval_loss": "loss", "eval_perplexity": "perplexity", "eval_word_perplexity": "word perplexity"}


def model_card(run: Path, config: dict[str, Any], manifest: dict[str, Any], dtype: str) -> str:
    """The card of the checkpoint that `manifest` describes; `config` is the run's."""
    settings, store, derived = config["settings"], config.get("store") or {}, config.get("derived") or {}
    shown = {key: value for key, value in settings.items() if key not in _HIDDEN}
    shown |= {f"commit of {name}": commit for name, commit in config.get("commits", {}).items()}
    name, step, command = run.absolute().name, int(manifest["step"]), config.get("command")
    rows = read_jsonl(run / METRICS)
    curve = [row for row in rows if row.get("step", math.inf) <= step and _number(row.get("eval_loss")) is not None]
    origin = "Trained from scratch" if settings["from_scratch"] else f"{settings['model']} fine-tuned"
    new_tokens = min(64, manifest["model_config"].get("n_positions", 1024) // 2)
    export = f"wikift consolidate {shlex.quote(str(settings['output_dir']))} --step {step} --dtype {dtype}"
    return printable("\n\n".join([
        _front_matter(name, settings, store, curve[-1] if curve and curve[-1]["step"] == step else {}),
        f"# {_text(name)}",
        f"{_text(origin)} on {_text(_dataset(settings, store))} with wikift {_text(str(config['wikift']))}; "
        f"step {step:,}, {manifest.get('tokens', 0):,} tokens seen, weights in {dtype}.",
        "## Validation", _validation(curve, step),
        "## Use", _code(_USE.replace("{new_tokens}", str(new_tokens)), "python"),
        "## Data", _data(store),
        "## Training", _facts({**shown, **derived, **derived.get("place", {}), **derived.get("shape", {})}),
        *(["## Reproduce", _code(f"{command}\n{export}")] if isinstance(command, str) else []),
    ]) + "\n")  # fmt: skip


def _front_matter(name: str, settings: dict[str, Any], store: dict[str, Any], scores: dict[str, Any]) -> str:
    """Metadata of the Hub; `scores`, the validation of these weights, becomes its table of results."""
    from huggingface_hub import EvalResult, ModelCardData

    base = None if settings["from_scratch"] else released_name(settings["model"])
    on_hub = "dataset_path" not in store and store.get("dataset") != "demo"
    dataset = store.get("dataset_name") if on_hub else None
    results = [
        EvalResult(
            task_type="text-generation", dataset_type=dataset or "text", dataset_split="validation",
            dataset_name=" ".join(_dataset(settings, store).split()), dataset_config=store.get("dataset_config"),
            metric_type=kind.replace(" ", "_"), metric_name=kind.capitalize(), metric_value=round(value, 4),
        )
        for key, kind in _SCORES.items() if (value := _number(scores.get(key))) is not None
    ]  # fmt: skip
    data = ModelCardData(
        language="en" if dataset == "Salesforce/wikitext" else None,
        license=base and ("apache-2.0" if base == "distilgpt2" else "mit"),  # of the weights it started from
        base_model=base and f"{'distilbert' if base == 'distilgpt2' else 'openai-community'}/{base}",
        datasets=[dataset] if dataset else None, library_name="transformers", pipeline_tag="text-generation",
        tags=["gpt2", "wikift"], metrics=["perplexity"] if results else None,
        model_name=" ".join(name.split()), eval_results=results or None,
    )  # fmt: skip
    return f"---\n{data}\n---"


def _dataset(settings: dict[str, Any], store: dict[str, Any]) -> str:
    name = str(store.get("dataset") or settings.get("dataset") or settings.get("data"))
    config = store.get("dataset_config")
    return Path(name).name + (f" ({config})" if config and config != name else "")


def _validation(curve: list[dict[str, Any]], step: int) -> str:
    if not curve:
        return "This checkpoint was not validated."
    best, stride = min(curve, key=lambda row: float(row["eval_loss"])), math.ceil(len(curve) / _CURVE_ROWS)
    shown = [row for i, row in enumerate(curve) if row is best or (len(curve) - 1 - i) % stride == 0]  # the last always
    form = {"step": ",", "tokens": ",", "loss": ".4f", "eval_loss": ".4f"} | dict.fromkeys(list(_SCORES)[1:], ",.2f")
    cells = [[format(row[k], f) if _number(row.get(k)) is not None else "" for k, f in form.items()] for row in shown]
    table = _table(("step", "tokens", "training loss", *(f"validation {kind}" for kind in _SCORES.values())), cells)
    note = "" if curve[-1]["step"] == step else " This step was not validated."
    return f"On the validation split; the lowest loss was at step {best['step']:,}.{note}\n\n{table}"


def _data(store: dict[str, Any]) -> str:
    tokenizer = store.get("tokenizer")
    facts = {key: value for key, value in store.items() if key not in ("format", "wikift", "dataset_path", "sha256")}
    facts |= {f"tokenizer {k}": v for k, v in tokenizer.items()} if isinstance(tokenizer, dict) else {}
    facts |= {key: Path(str(facts[key])).name for key in ("dataset", "tokenizer name") if key in facts}
    columns = ("rows", "tokens", "words", "bytes")
    splits = [[name, *(f"{split.get(c, 0):,}" for c in columns)] for name, split in store.get("splits", {}).items()]
    return _facts(facts) + "\n\n" + _table(("split", *columns), splits)


def _facts(facts: dict[str, Any]) -> str:
    """The numbers, texts and switches of `facts` as a table."""
    shown = {k.replace("_", " "): v for k, v in facts.items() if isinstance(v, (str, int, float))}
    return _table(("", ""), [(k, f"{v:g}" if isinstance(v, float) else str(v)) for k, v in shown.items()], "---")


def _table(head: Sequence[str], rows: Iterable[Iterable[str]], rule: str = "---:") -> str:
    lines = [head, [rule] * len(head), *(map(_text, row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _text(text: str) -> str:
    """`text` on one line, with nothing that Markdown would take for its own."""
    return re.sub(r"([\\`*_~&$@\[\]<>|]|:(?=//)|(?<=www)\.)", r"\\\1", " ".join(text.split()))


def _code(text: str, language: str = "") -> str:
    """A block of code; its fence is longer than any in `text`."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"
