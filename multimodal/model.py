"""The model: towers, projections, scale and bias. Everything that is learnt lives here."""

import fnmatch
import math
from collections.abc import Mapping
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.config import ModelSection
from multimodal.lengths import by_length
from multimodal.parts import TowerModule, Tuning


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
        lengths: Tensor | None = None,  # int64 [n] on the CPU, of the tower's inputs: less padding is computed
    ) -> Tensor:  # [n, D] unit norm, at least float32
        """One modality's features in the shared space; lengths change the time that it takes, and nothing else."""
        return self.project(tower, self.pool(tower, inputs, lengths))

    def pool(
        self,
        tower: str,
        inputs: Tensor,  # [n, ...] as the tower's preprocessor makes them
        lengths: Tensor | None = None,  # int64 [n] on the CPU
    ) -> Tensor:  # [n, W]
        """The first half of `encode`: what the tower gives."""
        module = self.towers[tower]
        assert isinstance(module, TowerModule)
        pooled: Tensor = module(inputs) if lengths is None else by_length(module, inputs, lengths, module.embedding)
        return pooled

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

    def forward(
        self,
        inputs: Mapping[str, Tensor],
        pooled: Mapping[str, Tensor] | None = None,
        lengths: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Features by name, from inputs by tower, or from what frozen towers made of them before."""
        known = lengths or {}
        features = {f"{tower}_features": self.encode(tower, x, known.get(tower)) for tower, x in inputs.items()}
        return features | {f"{tower}_features": self.project(tower, x) for tower, x in (pooled or {}).items()}

    def lengths(
        self,
        inputs: Mapping[str, Tensor],  # on the CPU, before they are copied to the device
    ) -> dict[str, Tensor]:  # int64 [n]
        """How much of each input features depend on, by tower, of those towers that read padded inputs."""
        found = {}
        for tower, x in inputs.items():
            module = self.towers[tower]
            assert isinstance(module, TowerModule)
            lengths = module.lengths(x)
            if lengths is not None:
                found[tower] = lengths
        return found

    def freeze(self, tunings: Mapping[str, Tuning]) -> None:
        """Stop the training of what the `tunings` of towers say is frozen; ValueError if that is not possible."""
        for name, tuning in tunings.items():
            tower = self.towers[name]
            assert isinstance(tower, TowerModule)
            depths = tower.depths()
            if tuning.unfrozen_blocks >= len(depths):
                blocks = len(depths) - 1
                raise ValueError(f"unfrozen_blocks={tuning.unfrozen_blocks} leaves nothing frozen of {blocks} blocks")
            if tuning.layer_decay < 1 and len(depths) == 1:
                raise ValueError("layer_decay: it is not known how the blocks of this tower follow each other")
            if tuning.frozen == "tower" and not tuning.unfrozen_blocks and not list(tower.projection.parameters()):
                raise ValueError("frozen=tower leaves nothing to train here: frozen=all, or unfrozen_blocks")
            if tuning.frozen != "none":
                for parameters in depths[: len(depths) - tuning.unfrozen_blocks]:
                    for parameter in parameters:
                        parameter.requires_grad_(False)
            if tuning.frozen == "all":
                tower.projection.requires_grad_(False)
            for pattern in tuning.frozen_names:
                found = [p for k, p in tower.named_parameters() if fnmatch.fnmatchcase(k, pattern)]
                if not found:
                    names = ", ".join([k for k, _ in tower.named_parameters()][:5])
                    raise ValueError(f"frozen_names: no parameter is named '{pattern}'; there are {names}, ...")
                for parameter in found:
                    parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """As in torch, but modules whose weights are all frozen stay in evaluation mode: nothing of them changes."""
        super().train(mode)
        for module in self.modules():
            weights = list(module.parameters())
            if weights and not any(weight.requires_grad for weight in weights):
                module.eval()
        return self

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep the multiplier at most `max_logit_scale`, as CLIP does after every update."""
        self.logit_scale.clamp_(max=math.log(self.max_logit_scale))

    def tower_parameters(self, tower: str) -> list[nn.Parameter]:
        """The parameters of a tower, its projection among them."""
        return list(self.towers[tower].parameters())

    def num_parameters(self) -> dict[str, int]:
        """Parameters by tower, in all, and those that are "trained", where some are not."""
        counts = {tower: sum(p.numel() for p in self.tower_parameters(tower)) for tower in self.towers}
        total = sum(p.numel() for p in self.parameters())
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return {**counts, "total": total, **({"trained": trained} if trained < total else {})}
