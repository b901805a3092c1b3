"""A running mean of the weights, which often does better than the weights themselves (Polyak and Juditsky 1992)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from multimodal import distributed
from multimodal.config import Weights
from multimodal.model import Model


class Ema:
    """What a model may be evaluated and saved with: its weights, and the mean of those that are trained.

    The mean starts from the weights as they are, and after every step is decay * mean + (1 - decay) * weights. Weights
    that are frozen, and buffers (statistics of a batch norm), are the model's own.
    """

    def __init__(
        self,
        model: Model,
        decay: float | None,  # None keeps no mean
    ) -> None:
        self.model, self.decay = model, decay
        self.weights = [p for p in model.parameters() if p.requires_grad and decay is not None]
        self.means = [p.detach().clone() for p in self.weights]  # sharded as they are

    @property
    def kinds(self) -> tuple[Weights, ...]:
        """Which weights there are."""
        return ("raw",) if self.decay is None else ("raw", "ema")

    @torch.no_grad()
    def update(
        self,
        updated: Tensor,  # [], 0 where weights were left as they were: so is the mean
    ) -> None:
        """Move the mean towards the weights, after a step."""
        if self.decay is not None:
            weights, means = ([distributed.local(x) for x in some] for some in (self.weights, self.means))
            change = torch._foreach_sub(weights, means)
            torch._foreach_mul_(change, (1 - self.decay) * updated)
            torch._foreach_add_(means, change)

    @contextmanager
    def in_place(self, kind: Weights) -> Iterator[None]:
        """The model has these weights inside; they change places one by one, in the memory that they have."""
        if kind == "ema":
            self._swap()
        try:
            yield
        finally:
            if kind == "ema":
                self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for p, mean in zip(self.weights, self.means, strict=True):
            weight, other = distributed.local(p), distributed.local(mean)
            kept = weight.clone()
            weight.copy_(other)
            other.copy_(kept)

    def state_dicts(self) -> dict[Weights, dict[str, Tensor]]:
        """The whole model with each kind of weights."""
        states: dict[Weights, dict[str, Tensor]] = {kind: self.model.state_dict() for kind in self.kinds}
        if self.decay is not None:
            means = {id(p): mean for p, mean in zip(self.weights, self.means, strict=True)}
            named = self.model.named_parameters(remove_duplicate=False)
            states["ema"] |= {name: means[id(p)] for name, p in named if id(p) in means}
        return states
