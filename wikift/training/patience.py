"""Early stopping: how long the validation loss has not become better, as a value that a checkpoint's manifest keeps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Patience:
    """`worse` validations in a row have not been better than `best` (nats per token; inf before the first).

    `limit` of them end the run; 0 is no limit. It is counted in any case, so that a run may get a limit later.
    """

    limit: int
    best: float = math.inf
    worse: int = 0

    @classmethod
    def of(cls, manifest: dict[str, Any], limit: int) -> Patience:
        """Where a checkpoint's `manifest` left it; at the beginning where the manifest says nothing of it."""
        best = manifest.get("best_eval_loss")
        return cls(limit, math.inf if best is None else best, manifest.get("validations_since_best", 0))

    def after(self, loss: float) -> Patience:
        """Counted on by one validation. A loss that is not a number is not better."""
        if loss < self.best:
            return Patience(self.limit, loss, 0)
        return Patience(self.limit, self.best, self.worse + 1)

    @property
    def spent(self) -> bool:
        return 0 < self.limit <= self.worse

    @property
    def is_best(self) -> bool:
        """Whether the last validation is the best so far, and to be kept since the run may end without a better one."""
        return self.limit > 0 and self.worse == 0

    def facts(self) -> dict[str, Any]:
        """What a manifest keeps of it."""
        best = self.best if math.isfinite(self.best) else None
        return {"best_eval_loss": best, "validations_since_best": self.worse}
