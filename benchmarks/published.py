"""Published perplexities of GPT-2 on WikiText against what launch/evaluate.py measures by the same protocol.

    python benchmarks/published.py gpt2
    python benchmarks/published.py runs/mine/hf          # a fine-tuned model: against the numbers to beat
    python benchmarks/published.py gpt2 --dataset FOLDER --dataset-config wikitext-103-raw-v1

Where weights or text can't be had it says so, prints what is published, and changes nothing. Sources:
transformers#13761 (lm-eval of gpt2), karpathy/llm.c#276 (gpt2, stride 1,024), transformers' page on perplexity
(gpt2-large), and the README and model cards of neulab/knn-transformers (fine-tuned).
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wikift.base import folders
from wikift.base.errors import EnvironmentFault, UserError
from wikift.base.model_files import shape_of
from wikift.base.shape import RELEASED, released_name
from wikift.commands import main as command
from wikift.commands.evaluate import main as evaluate

# model, split, protocol, stride, key of evaluate's JSON, published
ZERO_SHOT = (
    ("gpt2", "test", "hf-doc", "1024", "perplexity", 29.94),
    ("gpt2", "test", "hf-doc", "512", "perplexity", 25.2),
    ("gpt2", "test", "lm-eval", None, "word_perplexity", 37.37),
    ("gpt2", "test", "lm-eval", None, "bits_per_byte", 0.9769),
    ("gpt2-large", "test", "hf-doc", "1024", "perplexity", 19.44),
    ("gpt2-large", "test", "hf-doc", "512", "perplexity", 16.44),
)
TO_BEAT = (
    ("distilgpt2", "validation", "knn", None, "perplexity", 18.25),
    ("gpt2", "validation", "knn", None, "perplexity", 14.84),
    ("gpt2-medium", "validation", "knn", None, "perplexity", 11.55),
    ("gpt2-large", "validation", "knn", None, "perplexity", 10.56),
)


def main(argv: list[str]) -> int:
    """Print published against measured for one model."""
    if not argv or argv[0].startswith("-"):
        raise UserError("MODEL: is missing; name gpt2, another released model, or a fine-tuned model's folder")
    model, text = argv[0], argv[1:] or ["--dataset", "wikitext-103-raw-v1"]
    folder = Path(model) / "model" if folders.is_run(Path(model)) else Path(model)
    base = released_name(model) if not folder.is_dir() else None
    shape = shape_of(str(folder) if folder.is_dir() else model)
    size = base or next((name for name in RELEASED if shape is not None and shape_of(name) == shape), None)
    known = ZERO_SHOT if base else TO_BEAT
    rows = [row for row in known if row[0] == size]
    if not rows:
        print(f"nothing is published here for {model} ({'zero-shot' if base else 'fine-tuned'}); there is:")
        rows, measurable = list(known), False
    else:
        measurable = True
    print(_line("model", "split", "protocol", "stride", "number", "published", "measured"))
    missing = ""
    for name, split, protocol, stride, key, published in rows:
        measured = ""
        if measurable and not missing:
            try:
                measured = f"{_measured(model, text, split, protocol, stride)[key]:.4g}"
            except EnvironmentFault as fault:
                missing = str(fault)
        print(_line(name, split, protocol, stride or "", key, published, measured or "-"), flush=True)
    if missing:
        print(f"not measured: {missing}")
    return command.EXIT_DONE


def _line(*cells: object) -> str:
    return "{:<12}  {:<10}  {:<8}  {:>6}  {:<16}  {:>9}  {:>9}".format(*cells)


def _measured(model: str, text: list[str], split: str, protocol: str, stride: str | None) -> dict[str, float]:
    words = [model, *text, "--split", split, "--protocol", protocol, "--json", "--precision", "fp32"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        evaluate(words + (["--stride", stride] if stride else []))
    found: dict[str, float] = json.loads(out.getvalue().splitlines()[-1])
    return found


if __name__ == "__main__":
    command.run(main)  # type: ignore[arg-type]
