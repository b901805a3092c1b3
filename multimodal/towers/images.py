"""What all image towers share: the knobs of preprocessing, the evaluation transform, normalisation on the device."""

from abc import ABC
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field, Strict
from torch import Tensor, nn

from multimodal.parts import Augment, Tower, TowerModule

Colour = Annotated[tuple[float, float, float], Strict(False)]


@dataclass(frozen=True)
class ImagePreprocessor:
    """From a PIL image to uint8 [C, H, W]: augmented in training, else the shorter side resized and the centre cropped.

    The evaluation form equals open_clip's `image_transform(is_train=False)` up to normalisation, which is the tower's,
    for RGB and grey images; others become RGB before they are resized, there after.
    """

    size: int
    interpolation: str
    augment: Augment

    def __call__(self, value: Image.Image, rng: Random | None) -> Tensor:
        from torchvision.transforms import functional as tv

        image = value.convert("RGB")
        if rng is not None:
            image = self.augment(image, self.size, rng)
        if image.size != (self.size, self.size):
            image = tv.resize(image, [self.size], tv.InterpolationMode(self.interpolation))
            image = tv.center_crop(image, [self.size, self.size])
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def save(self, folder: Path) -> None:
        """Nothing is learnt."""


class ImageEncoder(TowerModule):
    """A network on normalised images, behind the normalisation."""

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, width: int, mean: Colour, std: Colour) -> None:
        super().__init__()
        self.net = net
        self.width = width
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """From uint8 [n, C, H, W] to [n, W]."""
        features: Tensor = self.net((inputs.to(self.mean.dtype) / 255 - self.mean) / self.std)
        return features


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

    def preprocessor(
        self, captions: Callable[[], Iterable[str]], augment: Augment, saved: Path | None
    ) -> ImagePreprocessor:
        return ImagePreprocessor(self.image_size, self.interpolation, augment)
