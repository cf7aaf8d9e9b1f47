"""Two results of one benchmark on the same machine: what of wikift became worse by more than the noise.

What is compared is the rounds' ratios of wikift's figure to that of the contestant beside it, since a machine's speed
itself drifts; a figure that the other lacks is compared as it is. A drop is named where the medians differ by more than
the spreads of both results' rounds together, and by a twentieth at least (a fifth, where it stands alone). Two runs
differ by more than their rounds do, so a drop counts where a second run shows it too.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

SAME_MACHINE = ("cpu", "cpu_family_model", "cores", "torch")
LEAST, LEAST_ALONE = 0.05, 0.2
# the first follows from tokens/s, the second is as long as the model is large
_NOT_COMPARED = ("model GFLOP/s", "step s")

Results = Mapping[str, Any]  # what harness.write wrote


class Drop(NamedTuple):
    """A figure that became worse."""

    benchmark: str
    contestant: str
    figure: str
    text: str  # by how much, since when


def better_higher(figure: str) -> bool:
    return figure.endswith("/s")


def series(results: Results, contestant: str, figure: str) -> list[float]:
    """One value a round: the ratio to the contestant it is compared with, or the figure itself."""
    rounds, other = results["rounds"], results["against"].get(contestant, contestant)
    own: list[float] = rounds[contestant][figure]
    if other == contestant or figure not in rounds.get(other, {}):
        return own
    return [a / b for a, b in zip(own, rounds[other][figure], strict=True)]


def comparable(new: Results, old: Results) -> bool:
    """Whether both are of the same machine, settings, and torch."""
    places = [[results["machine"].get(key) for key in SAME_MACHINE] for results in (new, old)]
    return places[0] == places[1] and new["settings"] == old["settings"] and new["name"] == old["name"]


def drops(new: Results, old: Results) -> Iterator[Drop]:
    """Each figure of wikift that is worse than in `old` by more than the noise."""
    for contestant, figures in new["rounds"].items():
        if not contestant.startswith("wikift"):
            continue
        for figure in figures:
            if figure in _NOT_COMPARED or figure not in old["rounds"].get(contestant, {}):
                continue
            now, before = (series(results, contestant, figure) for results in (new, old))
            worse = statistics.median(before) - statistics.median(now)
            worse = worse if better_higher(figure) else -worse
            alone = now is figures[figure]
            least = (LEAST_ALONE if alone else LEAST) * statistics.median(before)
            noise = max(_spread(now) + _spread(before), least)
            if worse > noise:
                beside = new["against"].get(contestant, contestant)
                times = "" if alone else f", times {beside}"
                text = (
                    f"{new['name']}: {contestant}, {figure}{times}: {statistics.median(now):.3g}, was "
                    f"{statistics.median(before):.3g} on {old['date']}; worse by {worse:.2g}, the noise is {noise:.2g}"
                )
                yield Drop(new["name"], contestant, figure, text)


def in_both(first: Sequence[Drop], second: Sequence[Drop]) -> list[Drop]:
    """The drops of the second run that the first had too."""
    known = {drop[:3] for drop in first}
    return [drop for drop in second if drop[:3] in known]


def _spread(values: Sequence[float]) -> float:
    return max(values) - min(values)


def last(new: Results, folders: Sequence[Path]) -> Results | None:
    """The newest results in `folders`, oldest first, that `new` can be compared with."""
    for folder in reversed(folders):
        path = folder / f"{new['name']}.json"
        if path.exists() and comparable(new, old := json.loads(path.read_text(encoding="utf-8"))):
            return old  # type: ignore[no-any-return]
    return None
