"""What the losses over all pairs of two towers' features have in common."""

from abc import ABC, abstractmethod
from typing import Annotated, Literal, TypedDict

import torch
from pydantic import Strict
from torch import Tensor

from multimodal.batch import Features
from multimodal.parts import Loss


class Targets(TypedDict):
    """Arguments of the functions, for rows that are the same thing."""

    ids: Tensor | None
    same: Literal["positive", "masked"]


class PairLoss(Loss, ABC):
    """A term that compares every row of one tower with every row of another, over the global batch."""

    pair: Annotated[tuple[str, str], Strict(False)] = ("image", "text")
    """The two towers that are aligned."""
    duplicates: Literal["negative", "positive", "masked"] = "negative"
    """What two pairs of the same thing are to each other: negatives as any others, positives too, or left out."""
    same_by: Literal["caption", "label"] = "caption"
    """What makes two pairs the same thing: captions of equal tokens, or equal classes, where samples have some."""
    products: Literal["fp32", "bf16"] = "fp32"
    """Precision of the products of features; all sums of them are in float32 either way."""

    @abstractmethod
    def compare(
        self,
        x: Tensor,  # [b, D] of the first tower
        y: Tensor,  # [b, D] of the second
        features: Features,
    ) -> Tensor:  # []
        """The term itself."""

    def __call__(self, features: Features) -> Tensor:
        x, y = self.features(features)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.products == "bf16"):
            return self.compare(x, y, features)

    def needs(self) -> frozenset[str]:
        ids = () if self.duplicates == "negative" else (f"{self.same_by}_ids",)
        return frozenset([*(f"{tower}_features" for tower in self.pair), *ids])

    def features(self, features: Features) -> tuple[Tensor, Tensor]:
        """Of the two towers, [b, D] each."""
        x, y = (features.tensors[f"{tower}_features"] for tower in self.pair)
        return x, y

    def targets(self, features: Features) -> Targets:
        """Which rows are the same thing, and what that means."""
        ids = None if self.duplicates == "negative" else features.ids[self.same_by]
        return {"ids": ids, "same": "masked" if self.duplicates == "masked" else "positive"}
