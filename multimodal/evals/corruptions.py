"""Images made worse on purpose, in five degrees: noise, blur, JPEG, brightness, contrast, occlusion, rotation."""

import io
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import torch
from PIL import Image
from torch import Tensor

LEVELS: dict[str, tuple[float, ...]] = {
    "noise": (0.04, 0.08, 0.12, 0.18, 0.26),  # standard deviation, of the range of values
    "blur": (0.012, 0.018, 0.022, 0.026, 0.032),  # sigma, of the shorter side: from 0.4 to 1 pixel of 32, as CIFAR-10-C
    "jpeg": (40, 25, 15, 10, 7),  # quality
    "brightness": (1.3, 1.6, 2.0, 2.5, 3.0),  # factor
    "contrast": (0.6, 0.4, 0.3, 0.2, 0.1),  # factor
    "occlusion": (0.05, 0.1, 0.2, 0.3, 0.4),  # area of a grey square
    "rotation": (10, 20, 30, 45, 60),  # degrees, to one side or the other
}
"""By corruption, its strength at severities 1 to 5; near those of ImageNet-C where it has the same."""


def corrupt(
    image: Tensor,  # uint8 [3, H, W]
    corruption: str,
    severity: int,  # from 1
    seed: int,
) -> Tensor:  # uint8 [3, H, W]
    """The image made worse; what is random is the same for all severities, so that a higher one is more of the same."""
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as change

    level, rng = LEVELS[corruption][severity - 1], torch.Generator().manual_seed(seed)
    if corruption == "noise":
        noisy = image + 255 * level * torch.randn(image.shape, generator=rng)
        return noisy.round().clamp(0, 255).to(torch.uint8)
    if corruption == "blur":
        sigma = level * min(image.shape[1:])
        reach = max(1, round(3 * sigma))
        kernel = [2 * min(reach, (side - 1) // 2) + 1 for side in (image.shape[2], image.shape[1])]
        blurred: Tensor = change.gaussian_blur(image, kernel, [sigma, sigma])
        return blurred
    if corruption == "occlusion":
        return _occluded(image, level, rng)
    if corruption == "rotation":
        sign = 1 if torch.rand((), generator=rng) < 0.5 else -1
        grey = [128.0] * 3
        turned: Tensor = change.rotate(image, sign * level, InterpolationMode.BILINEAR, fill=grey)
        return turned
    changes: dict[str, Callable[[], Tensor]] = {
        "jpeg": lambda: change.pil_to_tensor(_compressed(change.to_pil_image(image), round(level))),
        "brightness": lambda: change.adjust_brightness(image, level),
        "contrast": lambda: change.adjust_contrast(image, level),
    }
    return changes[corruption]()


def _compressed(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def _occluded(image: Tensor, area: float, rng: torch.Generator) -> Tensor:
    """With a grey square of so much of the area, whole within the image if it fits, around a place at random."""
    height, width = image.shape[1:]
    side = round((area * height * width) ** 0.5)
    tall, wide = min(side, height), min(side, width)
    down, right = torch.rand(2, generator=rng).tolist()
    top, left = round(down * (height - tall)), round(right * (width - wide))
    covered = image.clone()
    covered[:, top : top + tall, left : left + wide] = 128
    return covered


class Corrupted(Sequence[Image.Image]):
    """Images, made worse when they are indexed; the same each time."""

    def __init__(self, images: Sequence[Any], corruption: str, severity: int, seed: int = 0) -> None:
        self.images, self.corruption, self.severity, self.seed = images, corruption, severity, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> Any:
        from torchvision.transforms.v2 import functional as change

        image = change.pil_to_tensor(self.images[index].convert("RGB"))
        seed = Random(f"{self.seed}/{range(len(self))[index]}").getrandbits(32)  # all that torch heeds
        return change.to_pil_image(corrupt(image, self.corruption, self.severity, seed))
