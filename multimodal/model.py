"""The model: towers, projections, scale and bias. Everything that is learnt lives here."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.batch import Features
from multimodal.config import ModelSection
from multimodal.parts import TowerModule


class Model(nn.Module):
    """Towers by name, each projected into one shared space of unit vectors."""

    def __init__(self, towers: Mapping[str, TowerModule], section: ModelSection) -> None:
        super().__init__()
        self.towers = nn.ModuleDict(towers)
        # As in open_clip, the parameter is the logarithm of the scale.
        scale = torch.tensor(math.log(section.logit_scale))
        self.logit_scale = nn.Parameter(scale, requires_grad=section.learn_logit_scale)
        self.logit_bias = None if section.logit_bias is None else nn.Parameter(torch.tensor(section.logit_bias))
        self.max_logit_scale, self.embed_dim = section.max_logit_scale, section.embed_dim

    def encode(
        self,
        tower: str,
        inputs: Tensor,  # [n, ...] as the tower's preprocessor makes them
    ) -> Tensor:  # [n, D] unit norm, at least float32
        """One modality's features in the shared space."""
        return self.project(tower, self.towers[tower](inputs))

    def project(
        self,
        tower: str,
        pooled: Tensor,  # [n, W] as the tower gives them
    ) -> Tensor:  # [n, D] unit norm, at least float32
        """The second half of `encode`, for a tower whose output is known."""
        projection = self.towers[tower].projection
        assert isinstance(projection, nn.Module)
        projected: Tensor = projection(pooled)
        return F.normalize(projected if projected.dtype == torch.float64 else projected.float(), dim=-1)

    def forward(self, inputs: Mapping[str, Tensor], pooled: Mapping[str, Tensor] | None = None) -> Features:
        """Features of a batch, from inputs by tower, or from what frozen towers made of them before."""
        tensors = {f"{tower}_features": self.encode(tower, x) for tower, x in inputs.items()}
        tensors |= {f"{tower}_features": self.project(tower, x) for tower, x in (pooled or {}).items()}
        return Features(tensors, self.logit_scale.exp(), self.logit_bias)

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep the multiplier at most `max_logit_scale`, as CLIP does after every update."""
        self.logit_scale.clamp_(max=math.log(self.max_logit_scale))

    def tower_parameters(self, tower: str) -> list[nn.Parameter]:
        """The parameters of a tower, its projection among them."""
        return list(self.towers[tower].parameters())

    def num_parameters(self) -> dict[str, int]:
        """Parameters by tower, and in all."""
        counts = {tower: sum(p.numel() for p in self.tower_parameters(tower)) for tower in self.towers}
        return {**counts, "total": sum(p.numel() for p in self.parameters())}
