"""The weights of a run's last checkpoints averaged, and whether that was better (Izmailov et al., arXiv:1803.05407).

Each number is summed over the checkpoints in float64, oldest first, divided, and rounded once to fp32. Memory is one
piece of one tensor in each precision, whatever the model and however many checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wikift.base import folders
from wikift.base.errors import UserError
from wikift.checkpoint.reader import Checkpoint, best_checkpoint, open_checkpoint
from wikift.export.weights import PIECE, Piece, Weights, read_weights


def last_checkpoints(run: Path, config: dict[str, Any], count: int) -> list[Checkpoint]:
    """A run's last `count` checkpoints, oldest first; `config` is its config.json.

    Raises UserError where so many are not kept: beside the newest ones an old best one may lie, which is not counted.
    """
    keep = int(config["settings"]["save_total_limit"])
    steps = folders.checkpoint_steps(run)[-keep:]
    if len(steps) < count:
        listed = f"steps {', '.join(map(str, steps))}" if len(steps) > 1 else "one"
        cure = f"--save-total-limit {count} or more" if keep < count else "smaller --save-steps"
        raise UserError(
            f"--average-last {count}: {run} kept its last {keep} checkpoints at most (--save-total-limit), and has "
            f"{listed}; train with {cure}, or average fewer"
        )
    return [open_checkpoint(folders.step_folder(run, step)) for step in steps[-count:]]


def mean_weights(checkpoints: Sequence[Checkpoint]) -> Weights:
    """The mean of the checkpoints' weights, element by element, in fp32."""
    shapes = checkpoints[0].shapes
    assert all(checkpoint.shapes == shapes for checkpoint in checkpoints)
    buffer, spare, total = np.empty(PIECE, np.float32), np.empty(PIECE, np.float32), np.empty(PIECE, np.float64)

    def pieces(name: str) -> Iterator[Piece]:
        count = math.prod(shapes[name])
        for start in range(0, count, PIECE):
            size = min(PIECE, count - start)
            piece, mean = buffer[:size], total[:size]
            mean.fill(0)
            for checkpoint in checkpoints:
                read_weights(checkpoint, name, start, piece, spare)
                mean += piece
            mean /= len(checkpoints)
            piece[:] = mean
            yield piece

    return Weights(shapes, pieces)


def verdict(folder: Path, run: Path, config: dict[str, Any], last: Checkpoint) -> str:
    """One sentence: is the model in `folder`, the mean, better than the run's `last` and best checkpoint?

    Scores it on the run's validation split as training did (context and stride a block, the run's precision) and
    compares that with the losses that the checkpoints recorded. Where it cannot, the sentence says why.
    """
    try:
        loss, precision = _validation_loss(folder, config)
    except UserError as error:
        return f"Whether the mean is better was not measured: {error.problems[0]}."
    words = f"On the validation split the mean's loss is {loss:.4f} ({precision})"
    best = best_checkpoint(run)
    others = [("last", last.path), *([("best", best)] if best is not None and best.name != last.path.name else [])]
    manifests = [(name, folders.read_json(path / "manifest.json")) for name, path in others]
    known = [(name, int(m["step"]), float(m["eval_loss"])) for name, m in manifests if m.get("eval_loss") is not None]
    if not known:
        return f"{words}; no checkpoint was validated, so there is nothing to compare it with."
    for name, step, score in known:
        words += f", the {name} checkpoint's (step {step:,}) {score:.4f}"
    return f"{words}: the mean is {'better' if loss < min(score for *_, score in known) else 'not better'}."


def _validation_loss(folder: Path, config: dict[str, Any]) -> tuple[float, str]:
    """(nats per token, precision). Raises UserError where the run's validation text is not to be had."""
    from wikift.data.store import open_store

    store = open_store(str(config["store_path"]))
    if store.record != config["store"]:
        raise UserError(f"{store.path} is not the store that this run was trained on any more")
    if not store.has_validation:
        raise UserError(f"{store.path} has no validation text")
    import torch
    from torch import Tensor
    from transformers.utils import logging

    from wikift.base.world import started_world
    from wikift.evaluation.score import score_split
    from wikift.model.gpt2 import NextTokenLoss, load_model, resolve_precision

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    settings, block = config["settings"], int(config["derived"]["block_size"])
    with started_world() as world:
        precision = resolve_precision(settings["precision"], world.device).name
        model = load_model(str(folder), world.device)
        losses = NextTokenLoss(model, precision)

        def nll(inputs: Tensor, targets: Tensor) -> Tensor:
            with torch.inference_mode():
                found: Tensor = losses(inputs.to(world.device), targets.to(world.device))
            return found.double().sum()

        batch = settings["per_device_eval_batch_size"]
        score = score_split(nll, store, "validation", context=block, stride=block, batch=batch, world=world)
    return score.loss, precision
