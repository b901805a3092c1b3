"""The records that travel through the project, and the legend of its dimension letters.

B       the global batch, over all ranks
b       this rank's rows of it
n       any number of rows (evaluation)
D       the shared embedding
W       the width of a tower's pooled output
C H W   an image: channels, height, width (uint8 until it is on the device)
L       text tokens (the context length)
P       image patches
K       classes
T       templates
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One example as a source gives it, before any tower's preprocessing."""

    key: str
    """Where it comes from, for messages: "shard.tar/000123", "images/cat.jpg"."""
    inputs: Mapping[str, Any]
    """What towers read, by name: "image" is a PIL image, "text" a tuple of captions, of which one is drawn per step."""
    label: int | None = None
    """Class index, where the source has classes."""


@dataclass(frozen=True)
class Batch:
    """This rank's rows of one global batch."""

    inputs: Mapping[str, Tensor]
    """By tower name: image uint8 [b, C, H, W], text int64 [b, L]."""
    indices: Tensor
    """int64 [b], the samples' places in their source (of the stand-in, where a sample was replaced)."""
    ids: Mapping[str, Tensor] = field(default_factory=dict)
    """int64 [b] each, equal for rows that are the same in some way: "caption", and "label" where samples have one."""
    replaced: list[str] = field(default_factory=list)
    """One line for each broken sample that another one stands in for: its key and what was wrong."""
    truncated: int = 0
    """How many captions were cut to fit the context."""
    pooled: Mapping[str, Tensor] = field(default_factory=dict)
    """By name of a frozen tower whose features are kept: [b, W], instead of its inputs."""
    lengths: Mapping[str, Tensor] = field(default_factory=dict)
    """By name of a tower that reads padded inputs: int64 [b] on the CPU, how much of each one matters."""

    def to(self, device: torch.device) -> "Batch":
        """On the device; lengths stay. From pinned memory nothing waits for that."""
        return self._each(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Where a GPU can fetch it while the processor goes on; the data loader asks for this."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        inputs, pooled, ids = ({k: change(x) for k, x in kind.items()} for kind in (self.inputs, self.pooled, self.ids))
        return replace(self, inputs=inputs, indices=change(self.indices), pooled=pooled, ids=ids)


@dataclass(frozen=True)
class Features:
    """What the model makes of a batch; losses take what they need from it by name."""

    tensors: Mapping[str, Tensor]
    """`<tower>_features`: [b, D], unit norm."""
    logit_scale: Tensor
    """[], the multiplier, already exponentiated."""
    logit_bias: Tensor | None = None
    """[], added to the logits (sigmoid losses)."""
    ids: Mapping[str, Tensor] = field(default_factory=dict)
    """Those of the batch."""
