"""What prepare, train and plan are told, with groups, units, defaults and rules; run_fields.py has the others."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from wikift.base.names import CUT_SEED, WIKITEXT
from wikift.base.shape import RELEASED
from wikift.settings.options import option

CONFIG_HELP = "TOML or JSON file of settings; the command line overrides it, --no-NAME turns off NAME = true"
DEVICES, PRECISIONS = ("auto", "cpu", "cuda"), ("auto", "bf16", "fp16", "fp32")

_model, _data, _batch = partial(option, group="model"), partial(option, group="data"), partial(option, group="batch")
_length, _optimizer = partial(option, group="length"), partial(option, group="optimizer")
_speed, _run, _store = partial(option, group="speed"), partial(option, group="run"), partial(option, group="store")
_text, _plan = partial(option, group="data", against=("data",)), partial(option, group="plan")


@dataclass(frozen=True)
class DataSettings:
    """Which text, and how it becomes tokens."""

    dataset: tuple[str, ...] | None = _text(
        None,
        f"{', '.join(WIKITEXT)}, demo, another Hub dataset, or your own text, JSON, CSV, Parquet or Arrow: a file, a "
        "folder or a 'PATTERN'; may be repeated",
        "NAME|PATH",
        shown="wikitext-103-v1; wikitext-2-v1 on one process",
    )
    dataset_config: str | None = _text(None, "configuration of a dataset that has several", "NAME", needs="dataset")
    dataset_revision: str | None = _text(
        None, "branch, tag or commit of a Hub dataset", "REVISION", shown="main", needs="dataset"
    )
    text_column: str = _text("text", "column that holds the text; a.b for the field b of the field a", "NAME")
    encoding: str | None = _text(None, "encoding of text files", "NAME", shown="UTF-8, or UTF-16 where it shows")
    validation_fraction: float | None = _text(
        None,
        "fraction of the training rows held out, chosen by seed, where the dataset has no validation split",
        "0..1",
        shown="0.05",
        rule="(0,1)",
    )
    tokenizer: str | None = _text(
        None,
        "a name on the Hub, a folder, or train:SIZE for a byte-level BPE of SIZE tokens trained on the train split",
        "NAME|PATH|train:SIZE",
        shown="the model's, gpt2",
    )
    append_eos: bool | None = _text(
        None,
        "end each row with the end-of-text token",
        shown="for documents: JSON, CSV, Parquet, Arrow and Hub datasets, other than WikiText",
    )
    workers: int | None = _text(None, "threads that tokenize", shown="all cores", role="view")


@dataclass(frozen=True)
class PrepareSettings(DataSettings):
    """Make a token store out of text: one flat file of ids per split, store.json, and the tokenizer.

    examples:
      wikift prepare --dataset wikitext-103-v1
      wikift prepare --dataset my.txt --tokenizer train:8192 --out data/mine
    """

    out: str | None = _store(None, "the store to make", "DIR", shown="data/DATASET-TOKENIZER")
    verify: bool = _store(False, "check every byte of a store that already exists")
    seed: int = _store(CUT_SEED, "seed of the held-out validation rows", rule=">=0")
    quiet: bool = _store(False, "print errors only")
    config: str | None = _store(None, CONFIG_HELP, "FILE")


@dataclass(frozen=True)
class TrainSettings(DataSettings):
    """Fine-tune GPT-2, or train it from scratch. The same command resumes where it stopped.

    examples:
      torchrun --nproc_per_node=4 -m wikift train
                     four processes: gpt2 on wikitext-103-v1
      wikift train
                     one process: gpt2 on wikitext-2-v1
      wikift train --dataset my.txt --model distilgpt2 --max-steps 500
                     your own text

    exit codes:
      0    done
      1    the machine or the training failed; the message says what is saved and what to do
      2    wrong settings or files; nothing was written
      75   stopped by a signal, all saved; the same command resumes
    """

    model: str = _model("gpt2", f"{', '.join(RELEASED)}, another GPT-2 on the Hub, or a folder", "NAME|PATH")
    revision: str | None = _model(None, "branch, tag or commit of a Hub model", "REVISION", shown="main")
    from_scratch: bool = _model(False, "random weights in the model's shape")
    config_overrides: str | None = _model(
        None, "with --from-scratch: n_layer=2,n_head=4,n_embd=128", "K=V,...", needs="from_scratch"
    )
    dropout: float | None = _model(
        None, "of embeddings, attention and residuals", "0..1", shown="the model's, 0.1", rule="[0,1)"
    )

    data: str | None = _data(None, "a store that the prepare command made", "DIR", against=("dataset",))
    data_fraction: float = _data(1.0, "train on a seeded random sample of the blocks", "0..1", rule="(0,1]")
    block_size: int | None = _data(None, "tokens predicted in one block", "TOKENS", shown="the model's context, 1024")

    global_batch_size: int | None = _batch(
        None,
        "blocks per optimizer step, over all processes; with the data and the seed it decides what is learned",
        "BLOCKS",
        shown="32, or the product of the next two",
        role="experiment",
    )
    per_device_train_batch_size: int | None = _batch(
        None,
        "micro-batch: blocks per forward pass and process",
        "BLOCKS",
        shown="the largest up to 64 that fits into memory; on a CPU up to 2,048 tokens",
    )
    gradient_accumulation_steps: int | None = _batch(None, "micro-batches per step", shown="by the global batch")

    num_train_epochs: float | None = _length(
        None, "passes over the data", "EPOCHS", shown="3", rule="(0,1e6]", against=("max_steps",)
    )
    max_steps: int | None = _length(None, "optimizer steps, in place of epochs", "STEPS", against=("num_train_epochs",))

    learning_rate: float | None = _optimizer(
        None, "its highest value", "LR", shown="5e-05; 6e-04 from scratch", rule=">0"
    )
    lr_scheduler_type: str = _optimizer(
        "linear",
        "schedule of the learning rate after the warm-up: linear or cosine to 0, or constant",
        "SCHEDULE",
        choices=("linear", "cosine", "constant"),
    )
    warmup_steps: float = _optimizer(
        0.0,
        "steps over which the learning rate rises from 0; below 1: a fraction of the run",
        "STEPS",
        shown="0",
        rule="steps",
    )
    weight_decay: float = _optimizer(0.0, "AdamW's, of matrices and embeddings; others have none", "DECAY", rule=">=0")
    adam_beta1: float = _optimizer(0.9, "AdamW's decay of the mean gradient", "0..1", rule="[0,1)")
    adam_beta2: float = _optimizer(0.999, "AdamW's decay of the mean squared gradient", "0..1", rule="[0,1)")
    adam_epsilon: float = _optimizer(1e-8, "AdamW's, against division by 0", "EPSILON", rule=">0")
    max_grad_norm: float = _optimizer(1.0, "clip the gradient's norm to this; 0 is no clipping", "NORM", rule=">=0")
    seed: int = _optimizer(42, "decides everything random", role="experiment", rule=">=0")

    precision: str = _speed(
        "auto",
        "number format of matmuls, weights stay fp32; auto: bf16 where the device has it natively, else fp32; tf32: "
        "fp32 whose matmuls a GPU rounds to 10 bits",
        choices=(*PRECISIONS, "tf32"),
    )
    residual_dtype: str = _speed(
        "fp32",
        "number format in which the layers' outputs are added up; bf16: less memory and traffic on a GPU, 8-bit sums",
        choices=("fp32", "bf16"),
    )
    gradient_checkpointing: bool = _speed(False, "less memory, a third more time")
    compile: bool | None = _speed(
        None,
        "torch.compile: half a minute to start; for long runs on a GPU, a CPU gains nothing from it",
        shown="on a GPU from 1,000 steps on, with DeepSpeed only where asked for",
    )
    deterministic: bool = _speed(False, "bit-for-bit reproducible on a GPU, with slower kernels; a CPU always is")
    engine: str = _speed(
        "auto",
        "how weights and work are split over the processes. single: one process; ddp: a full copy on each; fsdp: "
        "FSDP2, a shard on each; auto: the first of these that fits into memory",
        choices=("auto", "single", "ddp", "fsdp"),
        against=("deepspeed",),
    )
    fsdp_reshard: bool = _speed(
        True,
        "fsdp: free a block's weights after its forward; off: faster, more memory",
        against=("deepspeed", "reduce_dtype"),
    )
    reduce_dtype: str = _speed(
        "fp32",
        "number format in which gradients are summed over the processes; bf16: half the traffic, rounded to 8 bits",
        choices=("fp32", "bf16", "fp16"),
    )
    deepspeed: str | None = _speed(
        None, "ZeRO by a DeepSpeed config file: zero1, zero2, zero2_offload, zero3, zero3_offload, or your own", "FILE"
    )
    device: str = _speed("auto", "auto: cuda where there is one", choices=DEVICES)

    output_dir: str | None = _run(None, "the run's folder", "DIR", shown="runs/MODEL-DATASET")
    eval_steps: int | None = _run(
        None, "steps between validations; each save validates too", "STEPS", shown="--save-steps", role="schedule"
    )
    early_stopping_patience: int | None = _run(
        None, "stop after this many validations in a row without a new best", shown="never", role="schedule"
    )
    save_steps: int = _run(500, "steps between checkpoints", "STEPS")
    logging_steps: int = _run(10, "steps between lines of metrics.jsonl", "STEPS")
    async_save: bool = _run(True, "write checkpoints while training continues")
    save_total_limit: int = _run(2, "newest checkpoints kept, beside the best")
    save_only_model: bool = _run(False, "checkpoints of weights alone, a third in size; no run resumes from them")
    per_device_eval_batch_size: int = _run(8, "blocks per forward pass in validation", "BLOCKS")
    max_eval_samples: int | None = _run(
        None, "validate on the first blocks of the validation split only", "BLOCKS", shown="all", role="experiment"
    )
    sample_prompts: str | None = _run(None, "continue each line of a file now and then: samples.jsonl", "FILE")
    on_nonfinite: str = _run(
        "stop",
        "at a loss or gradient that is not finite: stop; skip that step; or rewind to the checkpoint before it and "
        "continue without the blocks up to it",
        choices=("stop", "skip", "rewind"),
        role="schedule",
    )
    hang_timeout: int = _run(1800, "end a run without progress for so long; every rank's stacks: stacks/", "SECONDS")
    profile: int | None = _run(None, "profile as many steps: profile/trace.json.gz, and where the time goes", "STEPS")
    sample_steps: int | None = _run(None, "steps between samples", "STEPS", shown="as validations")
    resume: str = _run("auto", "resume from the newest checkpoint, never, or from PATH", "auto|never|PATH")
    report_to: str | None = _run(None, "also log to wandb, tensorboard or both", "NAME,...", shown="none")
    wandb: bool = _run(False, "the same as --report-to wandb")
    dry_run: bool = _run(False, "as wikift plan: print what the run would be, need and take; write nothing")
    quiet: bool = _run(False, "print errors only")
    config: str | None = _run(None, CONFIG_HELP, "FILE")


def trackers_of(settings: TrainSettings) -> tuple[str, ...]:
    names = [name.strip() for name in (settings.report_to or "none").split(",")] + ["wandb"] * settings.wandb
    return tuple(dict.fromkeys(name for name in names if name != "none"))


@dataclass(frozen=True)
class PlanSettings(TrainSettings):
    """What a training would be, need and take. Writes nothing. Its settings are printed as a file that --config takes.

    As comments follow the memory of a process under each engine, download, disk, time, and the command to type.

    examples:
      wikift plan --model gpt2-xl --gpus 8 --gpu-memory 80GB --mfu 0.4 --gpu H100
                     for GPUs that are not here
      wikift plan --trial 20
                     measures speed and memory here
      wikift plan --find-lr
                     proposes a learning rate
    """

    gpus: int | None = _plan(
        None, "plan for as many GPUs, that need not be here", shown="what is here", against=("trial", "find_lr")
    )
    gpu_memory: str | None = _plan(
        None, "memory of each GPU: 80GB", "SIZE", shown="what is free here", against=("trial", "find_lr")
    )
    gpu: str | None = _plan(None, "with --mfu, what the GPUs are: H100, A100, ...", "NAME", shown="what is here")
    mfu: float | None = _plan(
        None, "compute the time from this fraction of the GPUs' peak FLOP/s", "0..1", rule="(0,1]", against=("trial",)
    )
    trial: int | None = _plan(None, "measure the time: train as many steps here, and keep nothing", "STEPS")
    find_lr: bool = _plan(False, "let the learning rate rise in the trial (100 steps) and propose one")
