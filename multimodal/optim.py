"""Parameter groups, optimizers, and schedules as pure functions of the step."""

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import torch
from pydantic import Field, Strict
from torch import nn

from multimodal.model import Model
from multimodal.parts import Optimizer, Schedule, TowerModule, Tuning


def parameter_groups(model: Model, optimizer: Optimizer, tunings: Mapping[str, Tuning]) -> list[dict[str, Any]]:
    """What is trained, in groups of the same peak learning rate (`lr` and `peak_lr`) and weight decay.

    Gains, biases and scales do not decay: what has fewer than two dimensions, or "bias" in its name within the tower
    (tables of relative positions). All else does, also embeddings of positions. open_clip does the same: what it leaves
    out by "bn", "ln" and "logit_scale" has fewer than two dimensions in its networks, and any word may have "ln" in it.

    With a layer decay d, a tower's projection has the tower's rate, its last block d times that, the one before d**2
    times, and what precedes the first of n blocks d**(n + 1) times (Bao et al. 2022, BEiT).
    ValueError if nothing is left to train.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    biases = {id(p) for tower in model.towers.values() for name, p in tower.named_parameters() if "bias" in name}
    seen: set[int] = set()

    def add(parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        for parameter in parameters:
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                decays = parameter.ndim >= 2 and id(parameter) not in biases
                groups.setdefault((lr, weight_decay if decays else 0.0), []).append(parameter)

    for name, tuning in tunings.items():
        tower = model.towers[name]
        assert isinstance(tower, TowerModule)
        lr = optimizer.lr if tuning.lr is None else tuning.lr
        weight_decay = optimizer.weight_decay if tuning.weight_decay is None else tuning.weight_decay
        depths = tower.depths()
        for depth, parameters in enumerate(depths):
            add(parameters, lr * tuning.layer_decay ** (len(depths) - depth), weight_decay)
        add(tower.projection.parameters(), lr, weight_decay)
    add(model.parameters(), optimizer.lr, optimizer.weight_decay)
    if not groups:
        raise ValueError("every weight is frozen: nothing is left to train")
    return [{"params": p, "lr": lr, "peak_lr": lr, "weight_decay": decay} for (lr, decay), p in groups.items()]


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
