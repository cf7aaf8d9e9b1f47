"""The finished plan of a run, all that training gets: from settings, processes, model and data. Imports no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wikift.base.errors import UserError
from wikift.base.files import read_lines
from wikift.base.shape import Shape, parse_overrides, with_overrides
from wikift.base.work import AdamSettings, Choice, Work
from wikift.settings import deepspeed, deepspeed_checks
from wikift.settings.batch_layout import BatchLayout
from wikift.settings.fields import DataSettings, TrainSettings, trackers_of
from wikift.settings.options import flag, names_by_role
from wikift.settings.resolve import command_of
from wikift.settings.schedule import Due, Schedule, due_of, epoch_steps, length_problems, schedule_of


@dataclass(frozen=True)
class ModelPlan:
    """What is trained. `changes` are laid over the model's configuration: --config-overrides and --dropout."""

    name: str  # of the Hub, or a folder
    from_scratch: bool
    shape: Shape
    changes: dict[str, Any]


@dataclass(frozen=True)
class RunPlan:
    """One run, decided. Early stopping's patience 0 is none; `experiment` is what a resumed run may not change."""

    output_dir: Path
    resume: str
    seed: int
    model: ModelPlan
    data_fraction: float
    blocks: int  # trained on in an epoch
    ranks: int
    schedule: Schedule
    work: Work  # as asked for; as `choose` takes it, once that is decided
    device: str
    deterministic: bool
    deepspeed: dict[str, Any]  # the config file, flat; empty for other engines
    due: Due
    patience: int
    save_total_limit: int
    save_only_model: bool
    eval_batch: int  # blocks of one forward, per process
    eval_blocks: int  # of a validation; 0: all
    prompts: tuple[str, ...]  # of samples
    trackers: tuple[str, ...]
    quiet: bool
    hang_timeout: float  # seconds
    experiment: dict[str, Any]
    settings: dict[str, Any]  # by name, resolved: for config.json, and what is watched
    command: str  # that starts the run again

    @property
    def block_size(self) -> int:
        return self.work.block_size

    @property
    def layout(self) -> BatchLayout:
        work = self.work
        return BatchLayout(self.ranks, work.micro_batch, work.accumulation, work.may_shrink)

    @property
    def steps(self) -> int:
        return self.schedule.steps

    @property
    def tokens_per_step(self) -> int:
        return self.layout.global_batch * self.block_size

    @property
    def epochs(self) -> float:
        return self.steps * self.layout.global_batch / self.blocks

    @property
    def summary(self) -> dict[str, str]:
        times = -(-self.layout.global_batch // self.blocks)  # above 1: the global batch is larger than the data
        repeated = f", each read up to {times:,} times in one step: lower --global-batch-size, or add text"
        return {
            "parameters": f"{self.model.shape.parameters:,}",
            "tokens per step": f"{self.tokens_per_step:,}",
            "train blocks": f"{self.blocks:,} blocks of {self.block_size:,} tokens{repeated if times > 1 else ''}",
            "steps": f"{self.steps:,} steps, {self.epochs:.2f} epochs",
            "warm-up steps": f"{self.schedule.warmup:,}",
        }

    def record(self) -> dict[str, Any]:
        return {
            "place": dataclasses.asdict(self.layout),
            "shape": dataclasses.asdict(self.model.shape),
            "block_size": self.block_size,
            "blocks": self.blocks,
            "steps": self.steps,
            "warmup_steps": self.schedule.warmup,
            "tokens_per_step": self.tokens_per_step,
            "parameters": self.model.shape.parameters,
        }

    def in_precision(self, precision: str) -> Work:
        """The work in `precision`, the resolved one, with what deepspeed.initialize is given."""
        work = dataclasses.replace(self.work, precision=precision)
        config = deepspeed.engine_config(self.deepspeed, work, self.ranks) if self.deepspeed else {}
        return dataclasses.replace(work, zero_config=config)


def changed_settings(old: dict[str, Any], new: dict[str, Any], role: str) -> dict[str, tuple[Any, Any]]:
    """The settings of `role` that differ, by flag: (the old value, the new one)."""
    defaults = {field.name: field.default for field in dataclasses.fields(TrainSettings)}
    pairs = {name: (old.get(name, defaults[name]), new[name]) for name in names_by_role(TrainSettings, role)}
    return {flag(name): (before, now) for name, (before, now) in pairs.items() if before != now}


def apply_scratch(settings: TrainSettings, shape: Shape, vocab_size: int | None) -> Shape:
    """`shape` as it is, or from scratch with the store's vocabulary, the block's length and --config-overrides."""
    if not settings.from_scratch:
        return shape
    if vocab_size is not None:
        shape = dataclasses.replace(shape, vocab_size=vocab_size)
    if settings.block_size is not None:  # positions beyond the block would never be trained
        shape = dataclasses.replace(shape, n_positions=settings.block_size)
    return with_overrides(shape, parse_overrides(settings.config_overrides or ""))


def plan_run(settings: TrainSettings, layout: BatchLayout, shape: Shape, tokens: int, vocab_size: int) -> RunPlan:
    """The plan for a train split of `tokens` tokens. Raises UserError with everything that does not fit."""
    block_size = settings.block_size or min(shape.n_positions, 1024)
    blocks = max(0, (tokens - 1) // block_size)
    problems = _fit_problems(settings, shape, block_size, tokens, vocab_size)
    blocks = max(1, round(blocks * settings.data_fraction))
    steps = settings.max_steps or epoch_steps(settings.num_train_epochs or 0.0, blocks, layout.global_batch)
    if problems := problems or length_problems(settings, steps):
        raise UserError(*problems)
    changes = parse_overrides(settings.config_overrides or "")
    if settings.dropout is not None:
        changes |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), settings.dropout)
    work, config = work_of(settings, layout, shape, block_size, steps)
    return RunPlan(
        output_dir=Path(settings.output_dir or ""),
        resume=settings.resume,
        seed=settings.seed,
        model=ModelPlan(settings.model, settings.from_scratch, shape, changes),
        data_fraction=settings.data_fraction,
        blocks=blocks,
        ranks=layout.ranks,
        schedule=schedule_of(settings, steps),
        work=work,
        device=settings.device,
        deterministic=settings.deterministic,
        deepspeed=config,
        due=due_of(settings, steps),
        patience=settings.early_stopping_patience or 0,
        save_total_limit=settings.save_total_limit,
        save_only_model=settings.save_only_model,
        eval_batch=settings.per_device_eval_batch_size,
        eval_blocks=settings.max_eval_samples or 0,
        prompts=tuple(read_lines(Path(settings.sample_prompts), "--sample-prompts") if settings.sample_prompts else ()),
        trackers=trackers_of(settings),
        quiet=settings.quiet,
        hang_timeout=settings.hang_timeout,
        experiment=_experiment(settings, block_size, layout.global_batch),
        settings=dataclasses.asdict(settings),
        command=command_of(settings, layout.ranks),
    )  # fmt: skip


def work_of(
    settings: TrainSettings, layout: BatchLayout, shape: Shape, block_size: int, steps: int
) -> tuple[Work, dict[str, Any]]:
    """What the engine has to compute, as asked for; and DeepSpeed's config file, flat."""
    config = deepspeed.read(settings.deepspeed)[0] if settings.deepspeed else {}
    stage = deepspeed_checks.stage(config)
    asked = Choice(f"zero{stage}", f"stage {stage} in {settings.deepspeed}")
    work = Work(
        engine=asked if config else Choice(settings.engine, "asked for"),
        compile={None: "auto", True: "yes", False: "no"}[settings.compile],
        shape=shape,
        block_size=block_size,
        micro_batch=layout.micro_batch,
        accumulation=layout.accumulation,
        may_shrink=layout.may_shrink,
        steps=steps,
        precision=settings.precision,
        gradient_checkpointing=settings.gradient_checkpointing,
        fsdp_reshard=settings.fsdp_reshard,
        residual_dtype=settings.residual_dtype,
        reduce_dtype=settings.reduce_dtype,
        adam=AdamSettings(settings.weight_decay, settings.adam_beta1, settings.adam_beta2, settings.adam_epsilon,
                          settings.max_grad_norm),
        zero_config={},
        save_aside=settings.async_save,
    )  # fmt: skip
    return work, config


def _experiment(settings: TrainSettings, block_size: int, global_batch: int) -> dict[str, Any]:
    """By flag, what the losses depend on beyond the schedule; the data is known by its store's fingerprint."""
    values = dataclasses.asdict(settings) | {"block_size": block_size, "global_batch_size": global_batch}
    values["model"] += " from scratch" if settings.from_scratch else ""
    data = {field.name for field in dataclasses.fields(DataSettings)}
    names = [n for n in names_by_role(TrainSettings, "experiment") if n not in (*data, "data", "from_scratch")]
    return {flag(name): values[name] for name in names}


def block_problems(settings: TrainSettings, shape: Shape) -> list[str]:
    if settings.block_size is None or settings.block_size <= shape.n_positions:
        return []
    return [f"--block-size {settings.block_size}: --model {settings.model} has only {shape.n_positions} positions"]


def _fit_problems(settings: TrainSettings, shape: Shape, block_size: int, tokens: int, vocab_size: int) -> list[str]:
    problems = block_problems(settings, shape)
    if tokens - 1 < block_size:
        fits = f"take --block-size {tokens - 1} or less, or more text" if tokens > 1 else "give more text"
        problems.append(
            f"--block-size {block_size}: the train split has {tokens} tokens, too few for one block; {fits}"
        )
    return problems + vocabulary_problems(settings, shape, vocab_size)


def vocabulary_problems(settings: TrainSettings, shape: Shape, vocab_size: int) -> list[str]:
    if shape.vocab_size >= vocab_size:
        return []
    return [
        f"--config-overrides vocab_size={shape.vocab_size}: the store's tokenizer has {vocab_size} tokens; "
        "remove vocab_size; the store determines it"
        if settings.from_scratch
        else f"--model {settings.model}: its vocabulary has {shape.vocab_size} tokens, the store's {vocab_size}; "
        "prepare the text with the model's tokenizer, or train --from-scratch"
    ]
