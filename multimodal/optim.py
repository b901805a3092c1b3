"""Parameter groups, optimizers, and schedules as pure functions of the step."""

import math
from typing import Annotated, Any

import torch
from pydantic import Field, Strict
from torch import nn

from multimodal.parts import Optimizer, Schedule


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices, which decay, and gains, biases and scales (fewer than two dimensions), which do not.

    The rule is open_clip's.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019), in torch's fused form."""

    betas: Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], Strict(False)]
    """Decay of the running means of the gradient and of its square."""
    eps: float = Field(gt=0)
    """Added to the root of the second mean."""

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)


class Cosine(Schedule):
    """Linear warm-up, then half a cosine down to `final_lr` at the end of the run."""

    final_lr: float = Field(ge=0, le=1)
    """Where the rate ends, as a share of the peak."""

    def __call__(self, step: int, warmup_steps: int, total_steps: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return self.final_lr + (1 - self.final_lr) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
