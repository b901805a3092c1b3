"""How long a run waits for a metric to become better before it stops early."""

import math
from typing import Literal

from pydantic import BaseModel


class Patience(BaseModel):
    """How long a metric has not become better."""

    of: str | None = None
    """The metric, and what counts as better: "eval/shapes/top1 max 0.01"."""
    best: float | None = None
    waited: int = 0
    """Evaluations since then."""

    def after(self, value: float, mode: Literal["max", "min"], min_delta: float) -> "Patience":
        """With one value more; what is no number is not better."""
        sign = 1 if mode == "max" else -1
        if math.isfinite(value) and (self.best is None or sign * (value - self.best) > min_delta):
            return self.model_copy(update={"best": value, "waited": 0})
        return self.model_copy(update={"waited": self.waited + 1})
