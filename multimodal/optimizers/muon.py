"""Muon for the matrices of blocks and AdamW for the rest, behind one interface."""

from typing import Any, ClassVar

import torch
from pydantic import Field

from multimodal.optim import Betas, heeding_found_inf
from multimodal.parts import Optimizer


class Muon(Optimizer):
    """Momentum made orthogonal, for the matrices of blocks (Jordan et al. 2024); all else is AdamW's.

    Embeddings, projections into the shared space, kernels of convolutions, gains, biases and scales are all else.
    Needs whole matrices: not for sharded weights.
    Updates are scaled to the size of AdamW's (Liu et al. 2025), so that one rate and one weight decay serve both.
    """

    elementwise: ClassVar[bool] = False

    momentum: float = Field(ge=0, lt=1)
    """Of the matrices' gradients."""
    nesterov: bool
    """Whether the gradient is added to the momentum once more."""
    ns_steps: int = Field(gt=0, lt=100)
    """Iterations of Newton and Schulz towards the orthogonal matrix, in bfloat16."""
    betas: Betas
    """AdamW's: decay of the running means of the gradient and of its square."""
    eps: float = Field(gt=0)
    """AdamW's: added to the root of the second mean."""

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        by_hidden: dict[bool, list[dict[str, Any]]] = {}
        for group in groups:
            by_hidden.setdefault(group.setdefault("hidden", False), []).append(group)
        return _Joined(groups, {hidden: self._build(hidden, some) for hidden, some in by_hidden.items()})

    def _build(self, hidden: bool, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        if not hidden:
            return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)
        muon = torch.optim.Muon(
            groups,
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            ns_steps=self.ns_steps,
            adjust_lr_fn="match_rms_adamw",
        )
        return heeding_found_inf(muon)


class _Joined(torch.optim.Optimizer):
    """Two optimizers, of the groups that are `hidden` and that are not, whose groups and state are this one's."""

    def __init__(self, groups: list[dict[str, Any]], parts: dict[bool, torch.optim.Optimizer]) -> None:
        super().__init__(groups, {})
        self.parts = parts

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for hidden, part in self.parts.items():
            part.param_groups = [group for group in self.param_groups if group["hidden"] == hidden]
            part.state = self.state  # loading a checkpoint replaces both
            part.found_inf = getattr(self, "found_inf", None)  # type: ignore[attr-defined]
            part.step()
