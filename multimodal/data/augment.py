"""Random changes to training images; evaluation never sees them."""

import math
from random import Random
from typing import Annotated, ClassVar

from PIL import Image, ImageEnhance
from pydantic import Field, Strict, field_validator

from multimodal.parts import Augment

Range = Annotated[tuple[float, float], Strict(False)]
Strength = Annotated[float, Field(ge=0, le=1)]
Probability = Annotated[float, Field(ge=0, le=1)]

NUM_ATTEMPTS = 10  # to find a crop that fits, as in torchvision


class Keep(Augment):
    """The image unchanged: training images are resized and cropped as in evaluation."""

    random: ClassVar[bool] = False

    def __call__(self, image: Image.Image, size: int, rng: Random) -> Image.Image:
        return image


class RandomCrop(Augment):
    """A random part of the image, resized to a square; then, where switched on, flipped and its colours changed.

    Boxes have the distribution of torchvision's RandomResizedCrop, with open_clip's default scale. Crop and resize are
    one pass, so at the border of the crop the bicubic filter sees the pixels beyond it, where torchvision repeats the
    edge. The colour changes equal ColorJitter's, in random order; there is no hue.
    """

    scale: Range = (0.9, 1.0)
    """Smallest and largest share of the image's area."""

    ratio: Range = (0.75, 1.3333)
    """Smallest and largest width of the crop over its height, before it is made square; drawn log-uniformly."""

    flip: Probability = 0.0
    """Probability of mirroring left and right."""

    brightness: Strength = 0.0
    """Factor on brightness is uniform in 1 - this to 1 + this; 0 switches it off."""

    contrast: Strength = 0.0
    """The same for contrast."""

    saturation: Strength = 0.0
    """The same for saturation."""

    grayscale: Probability = 0.0
    """Probability of taking all colour away."""

    @field_validator("scale", "ratio")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError(f"should be smallest, largest, both above 0, got {list(value)}")
        return value

    @field_validator("scale")
    @classmethod
    def _within_image(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[1] > 1:
            raise ValueError(f"a crop cannot be larger than its image (1.0), got {list(value)}")
        return value

    def __call__(self, image: Image.Image, size: int, rng: Random) -> Image.Image:
        box = self.box(*image.size, rng)
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
        if rng.random() < self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image = self._jitter(image, rng)
        return image.convert("L").convert("RGB") if rng.random() < self.grayscale else image

    def box(self, width: int, height: int, rng: Random) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of a crop inside an image of this size; central where no drawn shape fits."""
        for _ in range(NUM_ATTEMPTS):
            area = width * height * rng.uniform(*self.scale)
            ratio = math.exp(rng.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = rng.randint(0, width - w), rng.randint(0, height - h)
                return left, top, left + w, top + h
        w = min(width, max(1, round(height * self.ratio[1])))
        h = min(height, max(1, round(width / self.ratio[0])))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h

    def _jitter(self, image: Image.Image, rng: Random) -> Image.Image:
        changes = [
            (ImageEnhance.Brightness, self.brightness),
            (ImageEnhance.Contrast, self.contrast),
            (ImageEnhance.Color, self.saturation),
        ]
        for enhance, strength in rng.sample(changes, k=len(changes)):
            if strength > 0:
                image = enhance(image).enhance(rng.uniform(1 - strength, 1 + strength))
        return image
