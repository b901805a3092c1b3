"""What all image towers share: the knobs of preprocessing, the evaluation transform, normalisation on the device."""

from abc import ABC
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field, Strict
from torch import Tensor, nn

from multimodal.parts import Augment, Tower, TowerModule

Colour = Annotated[tuple[float, float, float], Strict(False)]
Resize = Literal["shortest", "longest", "squash"]


@dataclass(frozen=True)
class ImagePreprocessor:
    """From a PIL image to uint8 [C, H, W]: augmented in training, else resized and the centre cropped or padded.

    The evaluation form equals open_clip's `image_transform(is_train=False)` up to normalisation, which is the tower's,
    for RGB and grey images; others become RGB before they are resized, there after.
    """

    num_truncated: ClassVar[int] = 0

    size: int
    interpolation: str
    augment: Augment
    resize: Resize = "shortest"

    def __call__(self, value: Image.Image, rng: Random | None) -> Tensor:
        from torchvision.transforms import functional as tv

        image = value.convert("RGB")
        if rng is not None:
            image = self.augment(image, self.size, rng)
        if image.size != (self.size, self.size):
            image = tv.resize(image, self._resized(*image.size), tv.InterpolationMode(self.interpolation))
            image = tv.center_crop(image, [self.size, self.size])
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def _resized(self, width: int, height: int) -> list[int]:
        """What torchvision is told: one number for the shorter side, or height and width."""
        if self.resize == "shortest":
            return [self.size]
        if self.resize == "squash":
            return [self.size, self.size]
        longest = max(width, height)
        return [round(height * self.size / longest), round(width * self.size / longest)]

    def save(self, folder: Path) -> None:
        """Nothing is learnt."""


class ImageEncoder(TowerModule):
    """A network on normalised images, behind the normalisation."""

    net: Any
    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, projection: nn.Module, width: int, mean: Colour, std: Colour) -> None:
        super().__init__()
        self.net = net
        self.projection = projection
        self.width = width
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """From uint8 [n, C, H, W] to [n, W]."""
        return self.features((inputs.to(self.mean.dtype) / 255 - self.mean) / self.std)

    def features(
        self,
        pixels: Tensor,  # [n, C, H, W], normalised
    ) -> Tensor:  # [n, W]
        """What the network makes of them."""
        pooled: Tensor = self.net(pixels)
        return pooled


class ImageTower(Tower, ABC):
    """A tower that reads images."""

    reads: ClassVar[str] = "image"

    image_size: int = Field(gt=0)
    """Side of the square input, in pixels."""
    mean: Colour
    """Subtracted from pixels in 0 to 1, per channel."""
    std: Colour
    """Divides pixels after that, per channel."""
    interpolation: Literal["bicubic", "bilinear"]
    """How images are resized in evaluation."""
    resize: Resize = "shortest"
    """To what in evaluation: "shortest" side to the size and the centre cropped, "longest" and the rest filled with
    black, or "squash" both, whatever becomes of the proportions."""

    def preprocessor(
        self, captions: Callable[[], Iterable[str]], augment: Augment, saved: Path | None
    ) -> ImagePreprocessor:
        return ImagePreprocessor(self.image_size, self.interpolation, augment, self.resize)
