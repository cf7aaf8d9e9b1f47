"""What the commands that take runs are told: consolidate, evaluate, generate, report, compare, runs and log."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from wikift.base.names import TRACKERS
from wikift.settings.fields import DEVICES, PRECISIONS, PlanSettings, PrepareSettings, TrainSettings
from wikift.settings.options import option

_argument, _text, _prompts = (partial(option, group=name) for name in ("arguments", "text", "prompts"))
_sampling, _output, _speed = (partial(option, group=name) for name in ("sampling", "output", "speed"))


@dataclass(frozen=True)
class ConsolidateSettings:
    """Make a Hugging Face directory of a run's checkpoint: the newest, the best, or another one.

    examples:
      wikift consolidate runs/gpt2-wikitext-2-v1
      wikift consolidate runs/gpt2-wikitext-2-v1 --best --dtype bfloat16 --out models/small
    """

    run: str | None = _argument(None, "a run's folder or one checkpoint of it", "RUN_OR_CHECKPOINT")
    out: str | None = option(None, "the directory to make", "DIR", shown="RUN/hf")
    step: int | None = option(None, "the checkpoint of this step", "STEP", shown="the newest", against=("best",))
    best: bool = option(False, "the checkpoint with the lowest validation loss")
    dtype: str = option("float32", "number format of the weights written", choices=("float32", "bfloat16", "float16"))
    max_shard_size: str = option("5GB", "largest file of weights", "SIZE")
    push_to_hub: str | None = option(None, "upload the directory to this repository of the Hugging Face Hub", "NAME")
    private: bool = option(True, "make the repository a private one, where it does not exist yet", needs="push_to_hub")
    quiet: bool = option(False, "print errors only")


@dataclass(frozen=True)
class EvaluateSettings:
    """Perplexity of models by the field's protocols, side by side; without --protocol, all that the text allows.

    examples:
      wikift evaluate runs/gpt2-wikitext-2-v1
      wikift evaluate gpt2 runs/mine/hf --dataset wikitext-103-raw-v1 --split test
      wikift evaluate gpt2 --dataset wikitext-2-raw-v1 --protocol lm-eval --split test
      torchrun --nproc_per_node=4 -m wikift evaluate gpt2-xl --data data/wikitext-103-raw-v1-gpt2 --stride 64

    protocols:
      hf-doc   transformers' page on perplexity: rows joined by blank lines, strides 1024 and 512, per token
      blocks   run_clm.py's disjoint blocks, nothing dropped, per token and word
      knn      neulab/knn-transformers: context 1024, stride 512, per token and word
      paper    the GPT-2 paper: detokenized text, per original word
      lm-eval  lm-evaluation-harness' task wikitext: detokenized pages, per original word and byte
      free     --context and --stride as you like; the same without --protocol
    """

    models: tuple[str, ...] = _argument((), "Hugging Face directories, runs or names", "MODEL")
    protocol: str | None = option(
        None,
        "evaluation protocol, see below",
        choices=("hf-doc", "blocks", "knn", "paper", "lm-eval", "free"),
        shown="all that the text allows, in one table; free with --context or --stride",
    )
    data: str | None = _text(None, "a store that wikift prepare made", "DIR", shown="the store a run was trained on")
    dataset: tuple[str, ...] | None = _text(
        None,
        "instead of a store, a text as wikift prepare takes it; of a single file all is evaluated",
        "NAME|PATH",
        against=("data",),
    )
    dataset_config: str | None = _text(None, "configuration of a dataset that has several", "NAME", needs="dataset")
    text_column: str = _text("text", "column that holds the text", "NAME", needs="dataset")
    encoding: str | None = _text(
        None, "encoding of text files", "NAME", shown="UTF-8, or UTF-16 where it shows", needs="dataset"
    )
    split: str | None = _text(None, "split of the text", "NAME", shown="all but train, where there are others")
    context: int | None = option(
        None, "tokens per window", "TOKENS", shown="the protocol's, 1024, or the model's where that is less"
    )
    stride: int | None = option(None, "tokens between windows", "TOKENS", shown="the protocol's; of free, the context")
    per_device_eval_batch_size: int = option(8, "windows per forward pass")
    precision: str = option("auto", "number format of matmuls; auto: the stored weights'", choices=PRECISIONS)
    device: str = option("auto", "auto: cuda where there is one", choices=DEVICES)
    json: bool = option(False, "print JSON, one object per model, split and protocol")
    quiet: bool = option(False, "no progress")


@dataclass(frozen=True)
class GenerateSettings:
    r"""Generate text from a prompt. Without a prompt it is interactive.

    examples:
      wikift generate                              the newest run, interactive
      wikift generate runs/NAME --prompt "The Renaissance was"
      wikift generate runs/NAME --examples --json --seed 7
      wikift generate runs/NAME --prompts-file FILE --batch-size 32 --stop "\n" --json
      wikift generate -- --dataset demo --from-scratch
                         where runs/ has no model yet: settings after -- are those of wikift train
    """

    # None stands for the default that follows from `temperature`

    model: str | None = _argument(None, "a Hugging Face directory, run or name", "MODEL", shown="the newest of runs/")
    prompt: str | None = _prompts(
        None, "generate from this prompt and exit", "TEXT", against=("prompts_file", "examples")
    )
    prompts_file: str | None = _prompts(
        None, "generate from each line of a file and exit", "FILE", against=("examples",)
    )
    examples: bool = _prompts(False, "generate from five built-in prompts and exit")
    max_new_tokens: int = _sampling(128, "tokens of an answer, at most", "TOKENS")
    temperature: float = _sampling(0.8, "0 takes the likeliest token each time, as do_sample=False", "T", rule=">=0")
    top_k: int | None = _sampling(None, "sample from the K likeliest tokens; 0 is all", "K", shown="50", rule=">=0")
    top_p: float | None = _sampling(
        None, "sample from the likeliest tokens that make up P", "P", shown="0.95", rule="(0,1]"
    )
    repetition_penalty: float | None = _sampling(
        None, "above 1 repeats less", "R", shown="1.1; 1 at temperature 0", rule="[0.1,10]"
    )
    seed: int | None = _sampling(None, "same seed, same text", shown="42", rule=">=0")
    stop: tuple[str, ...] = _sampling((), "end before this text; may be repeated, \\n is a new line", "TEXT")
    num_return_sequences: int = _sampling(1, "answers to each prompt")
    json: bool = _output(False, "one JSON object per answer")
    batch_size: int = _speed(16, "sequences generated at once where there are several prompts")
    precision: str = _speed(
        "fp32",
        "number format of the weights; auto: bf16 where the device has it natively, else fp32",
        choices=PRECISIONS,
    )
    device: str = _speed("auto", "auto: cuda where there is one", choices=DEVICES)
    train: bool = _output(True, "train first where no model is named and runs/ has none")
    quiet: bool = _output(False, "answers only")


@dataclass(frozen=True)
class ReportSettings:
    """One HTML file of a run, or of several laid over each other: curves, settings, samples, scores; no network.

    examples:
      wikift report runs/gpt2-wikitext-2-v1
      wikift report runs/* --out all.html
      wikift report runs/a --png
      wikift report runs/a runs/b --text
    """

    runs: tuple[str, ...] = _argument((), "runs' folders; several are laid over each other", "RUN")
    out: str | None = option(
        None, "the file to write", "FILE", shown="RUN/report.html; report.html for several runs", against=("text",)
    )
    png: bool = option(
        False, "also a picture of its beginning, FILE with .png, by a Chromium that is installed", against=("text",)
    )
    text: bool = option(False, "print the tables as text, write no file")


@dataclass(frozen=True)
class CompareSettings:
    """Compare two runs: the settings that differ, validation losses and scores by wikift evaluate.

    exit codes:
      0    every difference is within --within
      1    one is not
      2    there is nothing to compare

    examples:
      wikift compare runs/a runs/b
      wikift compare runs/a runs/b --within 0.001
    """

    runs: tuple[str, ...] = _argument((), "two runs' folders", "RUN")
    within: float = option(
        0.01, "the largest difference that counts as equal, in nats (of ln perplexity)", "NATS", rule=">=0"
    )


@dataclass(frozen=True)
class RunsSettings:
    """The runs of a folder: state, steps, best validation loss, size and last sign of life.

    examples:
      wikift runs
      wikift runs experiments --prune
    """

    folder: str = _argument("runs", "the folder that the runs' folders are in", "FOLDER")
    prune: bool = option(False, "remove all checkpoints but each run's newest and best, after asking")
    yes: bool = option(False, "with --prune: do not ask", needs="prune")


@dataclass(frozen=True)
class LogSettings:
    """A run's metrics, whole, into Weights & Biases, TensorBoard or a CSV file. What a killed run or one without a
    network did not send is sent. Again, it adds only what is missing.

    examples:
      wikift log runs/mine --to tensorboard
      wikift log runs/mine --to wandb --model
    """

    run: str | None = _argument(None, "a run's folder", "RUN")
    to: str = option("csv", "where to", choices=(*TRACKERS, "csv"), shown="csv: RUN/metrics.csv")
    model: bool = option(False, "with --to wandb: upload RUN/hf too, as an artifact")


SETTINGS: dict[str, type[Any]] = {  # by command
    "prepare": PrepareSettings,
    "train": TrainSettings,
    "plan": PlanSettings,
    "consolidate": ConsolidateSettings,
    "evaluate": EvaluateSettings,
    "generate": GenerateSettings,
    "report": ReportSettings,
    "compare": CompareSettings,
    "runs": RunsSettings,
    "log": LogSettings,
}
