"""A running mean of the weights, which often does better than the weights themselves (Polyak and Juditsky 1992)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

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
        self.weights: list[Tensor] = [p for p in model.parameters() if p.requires_grad and decay is not None]
        self.means = [p.detach().clone() for p in self.weights]

    @property
    def kinds(self) -> tuple[Weights, ...]:
        """Which weights there are."""
        return ("raw",) if self.decay is None else ("raw", "ema")

    @torch.no_grad()
    def update(
        self,
        finite: Tensor,  # [], 0 where the step was left out: so is this one
    ) -> None:
        """Move the mean towards the weights, after a step."""
        if self.decay is not None:
            change = torch._foreach_sub(self.weights, self.means)
            torch._foreach_mul_(change, (1 - self.decay) * finite)
            torch._foreach_add_(self.means, change)

    @contextmanager
    def in_place(self, kind: Weights) -> Iterator[None]:
        """The model has these weights inside; nothing is copied."""
        raw = [p.data for p in self.weights]
        for p, data in zip(self.weights, self.means if kind == "ema" else raw, strict=True):
            p.data = data
        try:
            yield
        finally:
            for p, data in zip(self.weights, raw, strict=True):
                p.data = data

    def state_dicts(self) -> dict[Weights, dict[str, Tensor]]:
        """The whole model with each kind of weights."""
        states: dict[Weights, dict[str, Tensor]] = {}
        for kind in self.kinds:
            with self.in_place(kind):
                states[kind] = self.model.state_dict()
        return states
