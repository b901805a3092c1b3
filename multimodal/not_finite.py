"""Which step was the first whose loss or gradient was not finite, and of which samples its batch was made."""

from pathlib import Path

import torch
from torch import Tensor

from multimodal import distributed
from multimodal.batch import Batch
from multimodal.config import RunError
from multimodal.files import write_json
from multimodal.parts import Source

FILE = "not_finite.json"
"""In a run's folder: the step, and the keys of all of its samples in question."""
SHOWN = 8
"""So many samples are named in a message."""


class NotFinite:
    """Notes steps on the device, so that nothing waits for it; the same on all ranks but for their own rows."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.count = torch.zeros((), device=device)
        self.first = torch.zeros((), dtype=torch.int64, device=device)
        self.indices = torch.zeros(rows, dtype=torch.int64, device=device)
        self.finite_rows = torch.ones(rows, dtype=torch.bool, device=device)

    def note(
        self,
        step: int,
        batch: Batch,  # on the device
        finite: Tensor,  # [], 0 where the loss or a gradient was not
        finite_rows: Tensor,  # [b] bool, whether a row's features were
    ) -> None:
        """Remember the batch of a step if it is the first that was not finite."""
        is_first = (self.count == 0) & (finite == 0)
        self.first = torch.where(is_first, step, self.first)
        self.indices = torch.where(is_first, batch.indices, self.indices)
        self.finite_rows = torch.where(is_first, finite_rows, self.finite_rows)
        self.count += 1 - finite

    def require_none(
        self,
        step: int,  # the last that was noted
        source: Source,
        folder: Path,  # of the run
    ) -> None:
        """RunError with the samples if a step was not finite; asked where the device is waited for anyway."""
        if self.count:
            raise RunError(
                f"the loss or a gradient was not finite in {int(self.count)} of the steps up to {step}; "
                f"{self._report(source, folder)}. The last checkpoint is from before. If it is not "
                "for these samples, a lower optimizer.lr or max_grad_norm, or precision=fp32, may help"
            )

    def _report(self, source: Source, folder: Path) -> str:
        """Name the samples, those with features that are not finite if there are any; all of them go to a file."""
        indices, finite = (distributed.gather(x).cpu() for x in (self.indices, self.finite_rows.long()))
        bad = finite == 0
        chosen = indices[bad] if bad.any() else indices
        keys = [source.key(int(index)) for index in chosen]
        step = int(self.first)
        distributed.on_first_rank(lambda: write_json(folder / FILE, {"step": step, "samples": keys}))
        what = "features that are not finite are those of" if bad.any() else "all features were finite; its samples are"
        more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
        return f"the first of them is step {step}: {what} {', '.join(keys[:SHOWN])}{more} ({folder / FILE})"
