"""A run that is about to train: what it is made of, and what its loop may call."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, GPT2Config

from wikift.base.files import show_bytes
from wikift.base.folders import step_of
from wikift.base.world import World
from wikift.checkpoint.fragment import OPTIMIZER
from wikift.checkpoint.reader import Checkpoint
from wikift.checkpoint.writer import Saver
from wikift.data.batches import BatchLayout, ahead, count_blocks, micro_batches, sample_blocks
from wikift.data.store import TokenStore
from wikift.engines.base import Engine
from wikift.evaluation.score import Score, score_split
from wikift.generation.live import SAMPLING, sample_live
from wikift.settings.run_plan import RunPlan
from wikift.training import resume
from wikift.training.meter import Meter, memory_gb
from wikift.training.patience import Patience
from wikift.watch.health import drift
from wikift.watch.metrics import Log

_BITS = {2: torch.int16, 4: torch.int32}  # bytes of an element: the integer of as many
_SAVE_FAILED = 1 << 16  # above every signal's number, below resume.FOLDER_GONE


class _Interrupted(Exception):
    """A stop was asked for while validating."""


@dataclass(frozen=True)
class Training:
    """The parts of a run. Its methods are collective unless they say otherwise."""

    plan: RunPlan
    store: TokenStore
    world: World
    config: GPT2Config
    shapes: dict[str, tuple[int, ...]]  # of every parameter, by Hugging Face name
    engine: Engine
    log: Log
    saver: Saver
    meter: Meter
    stop_signal: Callable[[], int]  # the signal that asks for a stop, 0 while there is none; not collective
    start: Checkpoint | None
    held_before: float  # GB
    forecast: int  # bytes that a process takes beside these
    left_out: int  # steps whose blocks were passed over, see nonfinite.py

    @property
    def done(self) -> int:
        """The steps before this start."""
        return self.start.step if self.start is not None else 0

    @property
    def patience(self) -> Patience:
        """As the steps before this start left it."""
        return Patience.of(self.start.manifest if self.start is not None else {}, self.plan.patience)

    @property
    def skipped(self) -> int:
        """The steps before this start whose gradient overflowed."""
        return self.start.step - int(self.start.read(OPTIMIZER, "updates", 0, 1)) if self.start is not None else 0

    def batches(self) -> Iterator[list[Tensor]]:
        """Each step's micro-batches of this rank, from the first step of this start on; not collective."""
        plan, tokens = self.plan, self.store.tokens("train")
        items = sample_blocks(count_blocks(len(tokens), plan.block_size), plan.data_fraction, plan.seed)
        assert len(items) == plan.blocks
        work, world = plan.work, self.world
        layout = BatchLayout(plan.block_size, work.micro_batch, work.accumulation, world.rank, world.size)
        stream = micro_batches(tokens, items, layout, run_seed=plan.seed, first_step=self.done + self.left_out)
        return ahead(stream, self.world.device)

    def memory(self) -> str:
        """The most that a process has held since `held_before`, and what was forecast."""
        held = self.world.highest(int(1e9 * (memory_gb(self.world.device) - self.held_before)))
        return f"memory: {show_bytes(held)} a process at its peak, {show_bytes(self.forecast)} forecast"

    def validate(self) -> Score | None:
        """None where there is no validation text, or where a stop interrupted it."""
        if not self.store.has_validation:
            return None
        ids, most = self.store.tokens("validation"), self.plan.eval_blocks
        try:
            return score_split(
                self.engine.nll, ids[: most * self.plan.block_size + 1] if most else ids,
                self.store.splits["validation"], context=self.plan.block_size, batch=self.plan.eval_batch,
                world=self.world, progress=self._progress,
            )  # fmt: skip
        except _Interrupted:
            self.log.say("the validation is interrupted")
            return None
        finally:
            self.log.tick(now=None)

    def _progress(self, done: int, of: int) -> None:
        self.log.tick(now=f"validating: {done:,}/{of:,}")
        if self.stopped():
            raise _Interrupted  # torchrun waits 30 s after a signal, a validation on a CPU may take minutes

    def sample(self, step: int) -> None:
        self.log.tick(now="writing samples")
        tokenizer = AutoTokenizer.from_pretrained(self.store.path / "tokenizer", trust_remote_code=False)
        sampling = dataclasses.replace(SAMPLING, seed=self.plan.seed)
        positions = self.plan.model.shape.n_positions
        texts = sample_live(
            self.engine.next_logits, tokenizer, self.plan.prompts, sampling=sampling, positions=positions
        )
        self.log.samples(step, self.plan.prompts, texts)
        self.log.tick(now=None)

    def save(self, step: int, eval_loss: float | None, patience: Patience, *, stop: int = 0) -> None:
        """Begin to write the checkpoint of `step`; `eval_loss` is None where it was not validated.

        `stop`, a signal: the run ends here and the same command resumes it, so the optimizer's state is saved in any
        case.
        """
        if stop == resume.FOLDER_GONE:
            self.saver.abandon()
        weights_alone = self.plan.save_only_model and not stop
        self.log.tick(now="saving")
        self.log.sync()
        about = {
            "tokens": step * self.plan.tokens_per_step,
            "eval_loss": eval_loss,
            **patience.facts(),
            "settings": self.plan.settings,
            "layout": [self.world.size, self.plan.work.engine.name, self.plan.work.micro_batch],
            "experiment": resume.experiment(self.plan, self.store),
            "weights_alone": weights_alone,
            "left_out": self.left_out,
            "model_config": json.loads(self.config.to_json_string(use_diff=False)),
        }
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        fragments = (f for f in self.engine.fragments() if f.state == "weight" or not weights_alone)
        self.saver.save(fragments, step, about, shapes)
        self.log.tick(now=None)
        if patience.spent:
            self.log.say(
                f"stopped early at step {step:,}: {patience.worse} validations in a row were no better than "
                f"{patience.best:.4f}"
            )

    def check_replicas(self, step: int) -> None:
        """Whether what every rank holds a copy of is the same on all, to the bit."""
        if self.world.size == 1 or not (copies := list(self.engine.replicas())):
            return
        checksums = [row[0] for row in self.world.exchange([checksum(copies)])]
        for event in drift(step, checksums):
            self.log.event(event)

    def saved(self) -> dict[str, Any]:
        """What to log of a checkpoint that was published meanwhile; not collective."""
        saved = self.saver.take_saved()
        if saved is None:
            return {}
        times = {"save_stall_seconds": saved.stall_seconds, "save_seconds": saved.seconds}
        return {"saved_step": step_of(saved.path), **times}

    def agree(self, numbers: Sequence[float] = ()) -> tuple[int, list[list[float]]]:
        """(the signal that asks for a stop, 0 while there is none; every rank's `numbers`)."""
        return self._heeded(self.world.ask([self._code(), *numbers]))

    def ask(self, numbers: Sequence[float]) -> Callable[[], tuple[int, list[list[float]]]]:
        """Begin to `agree`: what this returns waits for the others. A stop asked for meanwhile comes a step later."""
        if self.world.size == 1:
            return lambda: self.agree(numbers)  # on the signal of that moment
        return partial(self._heeded, self.world.ask([self._code(), *numbers]))

    def _code(self) -> int:
        return max(_SAVE_FAILED if self.saver.fault else 0, self.stop_signal())

    def _heeded(self, answer: Callable[[], list[list[float]]]) -> tuple[int, list[list[float]]]:
        rows = answer()
        code = int(max(row[0] for row in rows))
        if code == _SAVE_FAILED:
            self.saver.finish()  # raises, on every rank
        return code, [row[1:] for row in rows]

    def stopped(self) -> int:
        """The signal that asks for a stop, 0 while there is none."""
        return self.agree()[0]

    def stopped_midway(self) -> int:
        """`stopped` between two micro-batches, for which ranks with GPUs do not wait: their steps take seconds."""
        return self.stopped() if self.world.size == 1 or self.world.device.type == "cpu" else 0


def checksum(tensors: Sequence[Tensor]) -> float:
    """A number of every bit of `tensors`, below 2**48, so that a float64 holds it."""
    sums = [t.detach().reshape(-1).view(_BITS[t.element_size()]).sum(dtype=torch.int64) for t in tensors]
    return float(sum(number * value for number, value in enumerate(torch.stack(sums).tolist(), 1)) % 2**48)
