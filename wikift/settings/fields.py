"""Every command's settings, with their groups, units and defaults. What follows from them is in derive.py.

Imports no torch, so `--help` and errors are instant.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from wikift.base.names import CUT_SEED, WIKITEXT
from wikift.base.shape import RELEASED
from wikift.settings.options import option

CONFIG_HELP = "TOML or JSON file of settings; the command line wins, --no-NAME takes back NAME = true"


@dataclass(frozen=True)
class DataSettings:
    """Which text, and how it becomes tokens."""

    dataset: str | None = option(
        None,
        f"{', '.join(WIKITEXT)}, demo, another Hub dataset, or your own .txt, .jsonl or .parquet: a file, or a folder "
        "with train.*, validation.*, test.* or in the Hub's layout",
        group="data",
        metavar="NAME|PATH",
        shown="wikitext-103-v1; wikitext-2-v1 on one process",
    )
    dataset_config: str | None = option(
        None, "configuration of a dataset that has several", group="data", metavar="NAME"
    )
    text_column: str = option("text", "column that holds the text", group="data", metavar="NAME")
    validation_fraction: float | None = option(
        None,
        "part of the train rows cut off, by seed, where the dataset has no validation split",
        group="data",
        metavar="0..1",
        shown="0.05",
    )
    tokenizer: str | None = option(
        None,
        "a name of the Hub, a folder, or train:SIZE for a byte-level BPE of SIZE tokens trained on the train split",
        group="data",
        metavar="NAME|PATH|train:SIZE",
        shown="the model's, gpt2",
    )
    append_eos: bool | None = option(
        None,
        "end each row with the end-of-text token",
        group="data",
        shown="for .jsonl, .parquet and Hub datasets other than WikiText",
    )
    workers: int | None = option(
        None, "threads that tokenize", group="data", metavar="N", shown="all cores", role="view"
    )


# What a setting on the command line displaces of the config file: the same question's answer, or what hangs on it.
EXCLUSIVE = {
    "max_steps": ("num_train_epochs",),
    "num_train_epochs": ("max_steps",),
    "data": tuple(field.name for field in fields(DataSettings)),
    "dataset": ("data", "dataset_config"),
}


@dataclass(frozen=True)
class PrepareSettings(DataSettings):
    """The prepare command: text to a token store."""

    out: str | None = option(None, "the store to make", group="store", metavar="DIR", shown="data/DATASET-TOKENIZER")
    verify: bool = option(False, "check every byte of a store that is there already", group="store")
    seed: int = option(CUT_SEED, "seed of the validation cut", group="store", metavar="N")
    quiet: bool = option(False, "print errors only", group="store")
    config: str | None = option(None, CONFIG_HELP, group="store", metavar="FILE")


@dataclass(frozen=True)
class TrainSettings(DataSettings):
    """The train command: a token store to a fine-tuned model."""

    model: str = option(
        "gpt2", f"{', '.join(RELEASED)}, another GPT-2 of the Hub, or a folder", group="model", metavar="NAME|PATH"
    )
    from_scratch: bool = option(False, "random weights in the model's shape", group="model")
    config_overrides: str | None = option(
        None, "with --from-scratch: n_layer=2,n_head=4,n_embd=128", group="model", metavar="K=V,..."
    )
    dropout: float | None = option(
        None, "dropout rate of embeddings, attention and residuals", group="model", metavar="0..1",
        shown="the model's, 0.1",
    )  # fmt: skip

    data: str | None = option(None, "a store that the prepare command made", group="data", metavar="DIR")
    data_fraction: float = option(1.0, "train on a seeded random sample of the blocks", group="data", metavar="0..1")
    block_size: int | None = option(
        None, "tokens predicted in one block", group="data", metavar="TOKENS", shown="the model's context, 1024"
    )

    global_batch_size: int | None = option(
        None, "blocks per optimizer step, over all processes; with the data and the seed it decides what is learned",
        group="batch", metavar="BLOCKS", shown="32, or what the two below make", role="experiment",
    )  # fmt: skip
    per_device_train_batch_size: int | None = option(
        None, "blocks of one forward, per process", group="batch", metavar="BLOCKS",
        shown="up to 8, by the global batch",
    )  # fmt: skip
    gradient_accumulation_steps: int | None = option(
        None, "forwards per optimizer step", group="batch", metavar="N", shown="by the global batch"
    )

    num_train_epochs: float | None = option(None, "passes over the data", group="length", metavar="EPOCHS", shown="3")
    max_steps: int | None = option(None, "optimizer steps, in place of epochs", group="length", metavar="STEPS")

    learning_rate: float | None = option(
        None, "the highest, after the warm-up", group="optimizer", metavar="LR", shown="5e-05; 6e-04 from scratch"
    )
    lr_scheduler_type: str = option(
        "linear", "schedule of the learning rate after the warm-up: linear or cosine to 0, constant, or "
        "warmup_stable_decay: constant, then to 0 over --decay-steps",
        group="optimizer", metavar="SCHEDULE", choices=("linear", "cosine", "constant", "warmup_stable_decay"),
    )  # fmt: skip
    warmup_steps: float = option(
        0.0, "steps over which the learning rate rises from 0; below 1: a part of the run", group="optimizer",
        metavar="STEPS", shown="0",
    )  # fmt: skip
    decay_steps: float | None = option(
        None, "last steps, over which warmup_stable_decay falls to 0; below 1: a part of the run", group="optimizer",
        metavar="STEPS", shown="0.2",
    )  # fmt: skip
    weight_decay: float = option(
        0.0, "AdamW's, of matrices and embeddings; biases and LayerNorm have none", group="optimizer", metavar="DECAY"
    )
    adam_beta1: float = option(0.9, "AdamW's decay of the mean gradient", group="optimizer", metavar="0..1")
    adam_beta2: float = option(0.999, "AdamW's decay of the mean squared gradient", group="optimizer", metavar="0..1")
    adam_epsilon: float = option(1e-8, "AdamW's, against division by 0", group="optimizer", metavar="EPSILON")
    max_grad_norm: float = option(
        1.0, "clip the gradient's norm to this; 0 is no clipping", group="optimizer", metavar="NORM"
    )
    seed: int = option(42, "decides everything random", group="optimizer", metavar="N", role="experiment")

    precision: str = option(
        "auto", "number format of matmuls, weights stay fp32; auto: bf16 where the device has it natively, else fp32",
        group="speed", choices=("auto", "bf16", "fp16", "fp32"),
    )  # fmt: skip
    gradient_checkpointing: bool = option(False, "less memory, a third more time", group="speed")
    compile: bool | None = option(
        None, "torch.compile: half a minute to start; for long runs on a GPU, a CPU gains nothing from it",
        group="speed", shown="on a GPU from 1,000 steps on, with DeepSpeed only where asked for",
    )  # fmt: skip
    deterministic: bool = option(
        False, "on a GPU too the same bits in every run, by slower kernels; a CPU has them anyway", group="speed"
    )
    engine: str = option(
        "auto", "how weights and work are split over the processes. single: one process; ddp: whole on each; fsdp: "
        "FSDP2, a shard on each; auto: the first of these that fits into memory",
        group="speed", choices=("auto", "single", "ddp", "fsdp"),
    )  # fmt: skip
    fsdp_reshard: bool = option(
        True, "fsdp: free a block's weights after its forward; without it faster, more memory", group="speed"
    )
    reduce_dtype: str = option(
        "fp32", "number format in which gradients are summed over the processes; bf16: half the traffic, rounded to 8 "
        "bits", group="speed", choices=("fp32", "bf16", "fp16"),
    )  # fmt: skip
    deepspeed: str | None = option(
        None,
        "ZeRO by a DeepSpeed config file: zero1, zero2, zero2_offload, zero3, zero3_offload, or your own",
        group="speed",
        metavar="FILE",
    )
    device: str = option("auto", "auto: cuda where there is one", group="speed", choices=("auto", "cpu", "cuda"))

    output_dir: str | None = option(None, "the run's folder", group="run", metavar="DIR", shown="runs/MODEL-DATASET")
    eval_steps: int | None = option(
        None, "steps between validations; each save validates too", group="run", metavar="STEPS", shown="--save-steps",
        role="schedule",
    )  # fmt: skip
    early_stopping_patience: int | None = option(
        None, "end the run after so many validations in a row that were no better than the best; the best checkpoint "
        "is kept", group="run", metavar="N", shown="never", role="schedule",
    )  # fmt: skip
    save_steps: int = option(500, "steps between checkpoints", group="run", metavar="STEPS")
    logging_steps: int = option(10, "steps between lines of metrics.jsonl", group="run", metavar="STEPS")
    async_save: bool = option(True, "write checkpoints while training continues", group="run")
    save_total_limit: int = option(2, "newest checkpoints kept, beside the best", group="run", metavar="N")
    per_device_eval_batch_size: int = option(8, "blocks of one forward in validation", group="run", metavar="BLOCKS")
    sample_prompts: str | None = option(
        None, "let the model continue each line of a file now and then: samples.jsonl", group="run", metavar="FILE"
    )
    sample_steps: int | None = option(
        None, "steps between samples", group="run", metavar="STEPS", shown="as validations"
    )
    resume: str = option(
        "auto", "resume from the newest checkpoint, never, or from PATH", group="run", metavar="auto|never|PATH"
    )
    wandb: bool = option(False, "log to Weights & Biases too", group="run")
    dry_run: bool = option(False, "print settings and derived numbers, do nothing", group="run")
    quiet: bool = option(False, "print errors only", group="run")
    config: str | None = option(None, CONFIG_HELP, group="run", metavar="FILE")


@dataclass(frozen=True)
class ConsolidateSettings:
    """The consolidate command: a checkpoint to a Hugging Face directory."""

    run: str | None = option(
        None,
        "a run's folder or one checkpoint of it",
        group="arguments",
        metavar="RUN_OR_CHECKPOINT",
    )
    out: str | None = option(None, "the directory to make", metavar="DIR", shown="RUN/hf")
    step: int | None = option(None, "the checkpoint of this step", metavar="STEP", shown="the newest")
    best: bool = option(False, "the checkpoint with the lowest validation loss")
    dtype: str = option("float32", "number format of the weights written", choices=("float32", "bfloat16", "float16"))
    max_shard_size: str = option("5GB", "largest file of weights", metavar="SIZE")
    quiet: bool = option(False, "print errors only")


@dataclass(frozen=True)
class EvaluateSettings:
    """The evaluate command: perplexity of Hugging Face directories by the field's protocols."""

    models: tuple[str, ...] = option((), "Hugging Face directories, runs or names", group="arguments", metavar="MODEL")
    protocol: str | None = option(
        None,
        "whose number: see below",
        choices=("hf-doc", "blocks", "knn", "paper", "lm-eval", "free"),
        shown="all that the text allows, in one table; free with --context or --stride",
    )
    data: str | None = option(
        None, "a store that wikift prepare made", group="text", metavar="DIR", shown="the store a run was trained on"
    )
    dataset: str | None = option(
        None,
        "instead of a store, a text as wikift prepare takes it; of a single file all is evaluated",
        group="text",
        metavar="NAME|PATH",
    )
    dataset_config: str | None = option(
        None, "configuration of a dataset that has several", group="text", metavar="NAME"
    )
    text_column: str = option("text", "column that holds the text", group="text", metavar="NAME")
    split: str | None = option(
        None, "split of the text", group="text", metavar="NAME", shown="all but train, where there are others"
    )
    context: int | None = option(
        None, "tokens of one window", metavar="TOKENS", shown="the protocol's, 1024, or the model's where that is less"
    )
    stride: int | None = option(
        None, "tokens between windows", metavar="TOKENS", shown="the protocol's; of free, the context"
    )
    per_device_eval_batch_size: int = option(8, "windows of one forward", metavar="N")
    precision: str = option(
        "auto",
        "number format of the matmuls; auto: that of the stored weights",
        choices=("auto", "bf16", "fp16", "fp32"),
    )
    device: str = option("auto", "auto: cuda where there is one", choices=("auto", "cpu", "cuda"))
    json: bool = option(False, "print JSON, one object a model, split and protocol")
    csv: bool = option(False, "print CSV, one line a model, split, protocol and normaliser")
    quiet: bool = option(False, "no progress")


@dataclass(frozen=True)
class GenerateSettings:
    """The generate command: prompts to text. None stands for the default that follows from `temperature`."""

    model: str | None = option(
        None,
        "a Hugging Face directory, a run or a name",
        group="arguments",
        metavar="MODEL",
        shown="the newest of runs/",
    )
    prompt: str | None = option(None, "answer this and leave", group="prompts", metavar="TEXT")
    prompts_file: str | None = option(None, "answer each line of a file and leave", group="prompts", metavar="FILE")
    examples: bool = option(False, "answer five built-in prompts and leave", group="prompts")
    max_new_tokens: int = option(128, "tokens of an answer, at most", group="sampling", metavar="TOKENS")
    temperature: float = option(0.8, "0 takes the likeliest token each time, as do_sample=False", group="sampling",
                                metavar="T")  # fmt: skip
    top_k: int | None = option(
        None, "sample from the K likeliest tokens; 0 is all", group="sampling", metavar="K", shown="50"
    )
    top_p: float | None = option(
        None, "sample from the likeliest tokens that make up P", group="sampling", metavar="P", shown="0.95"
    )
    repetition_penalty: float | None = option(
        None, "above 1 repeats less", group="sampling", metavar="R", shown="1.1; at temperature 0 none, which is 1"
    )
    seed: int | None = option(None, "same seed, same text", group="sampling", metavar="N", shown="42")
    stop: tuple[str, ...] = option(
        (), "end before this text; may be given several times, \\n is a new line", group="sampling", metavar="TEXT",
    )  # fmt: skip
    num_return_sequences: int = option(1, "answers to each prompt", group="sampling", metavar="N")
    num_beams: int = option(1, "beam search of this width, with --temperature 0", group="sampling", metavar="N")
    logprobs: bool = option(False, "with --json: each token with its log-probability under the model", group="output")
    json: bool = option(False, "one JSON object an answer", group="output")
    batch_size: int = option(16, "sequences written at once where there are several prompts", group="speed")
    precision: str = option(
        "fp32", "number format of the weights; auto: bf16 where the device has it natively, else fp32", group="speed",
        choices=("auto", "bf16", "fp32"),
    )  # fmt: skip
    device: str = option("auto", "auto: cuda where there is one", group="speed", choices=("auto", "cpu", "cuda"))
    train: bool = option(True, "train first where no model is named and runs/ has none", group="output")
    quiet: bool = option(False, "answers only", group="output")


def slug(name: str) -> str:
    """The last part of a path or Hub name, fit for a folder's name."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in Path(name).name or "data").strip(".") or "data"


def store_path(settings: DataSettings) -> Path:
    """Where prepare puts the store of these (resolved) settings unless told otherwise."""
    assert settings.dataset is not None
    assert settings.tokenizer is not None
    parts = [slug(settings.dataset), settings.dataset_config and slug(settings.dataset_config)]
    parts.append(
        settings.tokenizer.replace(":", "-") if settings.tokenizer.startswith("train:") else slug(settings.tokenizer)
    )
    return Path("data") / "-".join(filter(None, parts))
