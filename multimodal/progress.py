"""How far a run is: a bar in a terminal, lines elsewhere."""

import logging
from types import TracebackType

from tqdm import tqdm

logger = logging.getLogger(__name__)

LINES = 20
"""How many lines a run prints on its progress where there is no terminal for a bar."""


class Progress:
    """Counts steps on their way to the last one."""

    def __init__(self, name: str, step: int, total_steps: int, shown: bool) -> None:
        hide = None if shown else True  # None hides it where there is no terminal
        self.step, self.told, self.total_steps = step, step, total_steps
        self.bar = tqdm(total=total_steps, initial=step, desc=name, unit="step", disable=hide)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.bar.close()

    def advance(self) -> None:
        """A step was taken."""
        self.step += 1
        self.bar.update()

    def tell(self, loss: float, samples_per_s: float) -> None:
        """What was logged at this step."""
        self.bar.set_postfix(loss=f"{loss:.3f}", samples_per_s=f"{samples_per_s:.0f}")
        line = max(1, self.total_steps // LINES)
        if self.bar.disable and self.step // line > self.told // line:
            logger.info("step %d of %d: loss %.4f, %.0f samples/s", self.step, self.total_steps, loss, samples_per_s)
        self.told = self.step
