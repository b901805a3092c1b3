"""Lion, which torch does not have."""

from typing import Any

import torch

from multimodal import distributed
from multimodal.optim import Betas, heeding_found_inf
from multimodal.parts import Optimizer


class Lion(Optimizer):
    """The sign of a mean of gradients, with decoupled weight decay (Chen et al. 2023, algorithm 2).

    Every weight moves by the rate itself, so the rate wants to be 3 to 10 times smaller than AdamW's and the weight
    decay as many times larger. Keeps one moment where AdamW keeps two. Made for large batches: the paper's gains begin
    at some thousands.
    """

    betas: Betas
    """How much of the running mean is in the sign that is taken, and how much of it stays."""

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return heeding_found_inf(_Lion(groups, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay))


class _Lion(torch.optim.Optimizer):
    def __init__(self, groups: list[dict[str, Any]], **defaults: Any) -> None:
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            trained = [weight for weight in group["params"] if weight.grad is not None]
            for weight in trained:
                if not self.state[weight]:
                    self.state[weight]["exp_avg"] = torch.zeros_like(weight)
            weights = [distributed.local(weight) for weight in trained]
            grads = [distributed.local(weight.grad) for weight in trained]
            means = [distributed.local(self.state[weight]["exp_avg"]) for weight in trained]
            if weights:  # torch's operations on lists want some
                update = torch._foreach_lerp(means, grads, 1 - beta1)
                torch._foreach_sign_(update)
                torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
                torch._foreach_add_(weights, update, alpha=-lr)
                torch._foreach_lerp_(means, grads, 1 - beta2)
