"""What the logged numbers say of a run's health: pure functions. Limits and sources: docs/explanation/health.md."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import fmean, median_low, pstdev
from typing import Any

Row = dict[str, Any]  # a line of metrics.jsonl

WINDOW = 100  # logged lines that are looked back on
_SPIKE_WINDOW, _FEWEST = 50, 20  # of them, for a spike: at most, and at least
_DEVIATIONS = 7.0  # a spike's distance from the mean, in standard deviations
_LEAST_NATS = 0.1  # of a spike of the loss
_LEAST_TIMES = 3.0  # of the mean, of a gradient norm that explodes
_IN_A_ROW, _LEAST_SECONDS = 5, 10.0  # lines and their time, of what may be chance in one
_SLOW_TIMES = 2.0  # the median of the ranks' times
_DATA_WAIT = _BUSIER = 0.2  # of the time
MOST_SKIPPED = 50  # steps in a row that may be skipped: the weights are beyond repair, or a loss scale is at its end


def events(before: Sequence[Row], row: Row, logged: int) -> Iterator[Row]:
    """What `row`, after the `logged` earlier lines, of which `before` are the last, gives to worry about."""
    yield from _spikes(before, row)
    yield from _stuck([*before, row], logged + 1)
    yield from _late([*before, row])


def _event(row: Row, kind: str, message: str) -> Row:
    return {"step": row["step"], "event": kind, "message": message}


def _spikes(before: Sequence[Row], row: Row) -> Iterator[Row]:
    for key, kind, advice in (
        ("loss", "loss spike", "if it does not come back, resume an earlier checkpoint with a lower --learning-rate"),
        ("grad_norm", "gradient norm", "lower --learning-rate or --max-grad-norm, or use more --warmup-steps"),
    ):
        values, new = [v for r in before[-_SPIKE_WINDOW:] if math.isfinite(v := _number(r, key))], _number(row, key)
        if len(values) < _FEWEST or not math.isfinite(new):
            continue
        mean, deviation = fmean(values), pstdev(values)
        least = _LEAST_NATS if key == "loss" else (_LEAST_TIMES - 1) * mean
        if new > mean + max(_DEVIATIONS * deviation, least):
            name = "the loss" if key == "loss" else "the gradient's norm"
            text = f"{name} is {new:.3g}, {mean:.3g} in the {len(values)} lines before (standard deviation"
            yield _event(row, kind, f"{text} {deviation:.2g}); {advice}")


def _stuck(rows: Sequence[Row], logged: int) -> Iterator[Row]:
    """Asked once, of the run's first lines, unless the learning rate is still rising in them."""
    losses, rates = ([_number(r, key) for r in rows[-WINDOW:]] for key in ("loss", "learning_rate"))
    if logged != WINDOW or min(rates) < max(rates) / 2 or not all(map(math.isfinite, losses)):
        return
    first, second = losses[: WINDOW // 2], losses[WINDOW // 2 :]
    error = math.hypot(pstdev(first), pstdev(second)) / math.sqrt(WINDOW // 2)
    if fmean(second) > fmean(first) - error:
        yield _event(
            rows[-1], "no learning",
            f"the loss does not move: {fmean(first):.4f}, then {fmean(second):.4f}, the means of {WINDOW // 2} lines "
            "each; try a higher --learning-rate, and look at the text (wikift prepare --verify)",
        )  # fmt: skip


def _late(rows: Sequence[Row]) -> Iterator[Row]:
    """Ranks that have just been late for long enough."""
    for key, limit, text in (
        ("matmul_ms", _SLOW_TIMES, "computes {:.2f} times slower than the median rank; look at its clock, its "
         "temperature and at what else runs there"),
        ("data_wait", _DATA_WAIT, "waits {:.0%} of the time for its batches, and all others for it; put the store on "
         "a faster disk, or look at what else uses the processor"),
        ("busy", _BUSIER, "is at work while others wait for it, {:.0%} of the time more than the median rank; kill "
         "-USR2 its process writes what it does to stacks/, and look at what else runs on its host"),
    ):  # fmt: skip
        for rank in sorted(_late_ranks(rows, key, limit) - _late_ranks(rows[:-1], key, limit)):
            yield _event(rows[-1], "late rank", f"rank {rank} {text.format(_shares(rows[-1], key)[rank])}")


def _late_ranks(rows: Sequence[Row], key: str, limit: float) -> set[int]:
    """The ranks that are above `limit` in each of the last lines, so many and so long that it is no chance."""
    for start in range(len(rows) - _IN_A_ROW, -1, -1):
        tokens = _number(rows[-1], "tokens") - _number(rows[start], "tokens")
        if tokens / max(_number(rows[-1], "tokens_per_second"), 1e-9) >= _LEAST_SECONDS:
            each = ({rank for rank, value in enumerate(_shares(r, key)) if value > limit} for r in rows[start:])
            return set.intersection(*each)
    return set()


def _shares(row: Row, key: str) -> list[float]:
    values: list[float] = row.get("ranks", {}).get(key, [])
    middle = median_low(values) if values else 0.0
    if key == "busy":
        return [value - middle for value in values]
    return [value / max(middle, 1e-9) for value in values] if key == "matmul_ms" else values


def slowest(times: Sequence[float]) -> tuple[int, float]:
    """(the rank with the longest of `times`, how many times the median's that is)."""
    rank = max(range(len(times)), key=times.__getitem__)
    return rank, times[rank] / max(median_low(times), 1e-9)


def drift(step: int, checksums: Sequence[float]) -> Iterator[Row]:
    """Whether the ranks' copies of the weights are still the same, by each one's checksum."""
    usual = Counter(checksums).most_common(1)[0][0]
    if others := [str(rank) for rank, checksum in enumerate(checksums) if checksum != usual]:
        yield _event(
            {"step": step}, "drift",
            f"the weights of rank {', '.join(others)} are not those of the other ranks: what is learned is wrong. "
            "Suspect that GPU's memory or its host; resume elsewhere, from a checkpoint before this step",
        )  # fmt: skip


def not_finite(step: int, losses: Sequence[float], count: int, last: int) -> Row:
    """`count` steps, the `last` one included, were skipped since the line before; `losses` are the ranks' at `step`."""
    ranks = [str(rank) for rank, loss in enumerate(losses) if not math.isfinite(loss)]
    where = f" on rank {', '.join(ranks)}" if ranks and len(losses) > 1 else ""
    text = f"{count} step{'s' * (count > 1)} skipped, step {last:,} the last: its gradient{where} is not finite"
    return _event({"step": step}, "not finite", text + "; weights and moments are as before")


def _number(row: Row, key: str) -> float:
    value = row.get(key)
    return math.nan if value is None else float(value)
