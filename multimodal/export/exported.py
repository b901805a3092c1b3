"""A trained model on its way to another library, and the inputs on which the two are compared."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from multimodal import checkpoint
from multimodal.config import EVAL, TrainConfig, Weights
from multimodal.data.loader import Reader
from multimodal.model import Model
from multimodal.run_folder import ENVIRONMENT
from multimodal.towers.images import ImageTower
from multimodal.towers.text import TextPreprocessor, TextTower
from multimodal.tracker import METRICS

SIZES = ((64, 64), (500, 375), (120, 300), (37, 37), (224, 224))
TEXTS = (
    "a photo of a cat",
    "Two red circles  above a blue square.\n",
    "a",
    "",
    "many words " * 60,
    "caf\u00e9, na\u00efve; 3.5% of \u732b & \U0001f431!",
    "<pad> <|endoftext|> [SEP] </s> <end_of_text>",
)
"""Also those that tokenizers tend to disagree on."""


@dataclass(frozen=True)
class Record:
    """What is written down about the training of a checkpoint."""

    step: int
    num_samples: int
    """In the training data."""
    precision: str
    """Of the towers."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the evaluations at that step."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of what it was trained with: the revision of the code, Python, packages."""


@dataclass(frozen=True)
class Exported:
    """A model in evaluation mode, in float32 on the CPU, with what it was trained by and on."""

    config: TrainConfig
    model: Model
    readers: dict[str, Reader]
    record: Record

    def __post_init__(self) -> None:
        towers = self.config.towers
        if (
            set(towers) != {"image", "text"}
            or not isinstance(towers["image"], ImageTower)
            or not isinstance(towers["text"], TextTower)
        ):
            told = ", ".join(f"{name} ({type(tower).__name__})" for name, tower in towers.items())
            raise ValueError(f"what is exported has two towers, image and text, of these kinds; this has {told}")

    @property
    def towers(self) -> tuple[ImageTower, TextTower]:
        """The two, as they are described."""
        image, text = self.config.towers["image"], self.config.towers["text"]
        assert isinstance(image, ImageTower)
        assert isinstance(text, TextTower)
        return image, text

    @property
    def text(self) -> TextPreprocessor:
        """What reads texts; too long ones are cut, as other libraries do, also where training refused them."""
        preprocessor = self.readers["text"].preprocessor
        assert isinstance(preprocessor, TextPreprocessor)
        return TextPreprocessor(preprocessor.encoding, preprocessor.context_length)

    @property
    def logit_scale(self) -> float:
        """The multiplier of cosines."""
        return self.model.logit_scale.exp().item()

    @property
    def logit_bias(self) -> float | None:
        """What is added to them, if anything is."""
        return None if self.model.logit_bias is None else self.model.logit_bias.item()

    def ids(self) -> Tensor:
        """int64 [n, L], of `TEXTS`."""
        return torch.stack([self.text(text, None) for text in TEXTS])

    def pixels(self) -> Tensor:
        """uint8 [n, 3, H, W], of `pictures`."""
        return torch.stack([self.readers["image"].preprocessor(picture, None) for picture in pictures()])

    def normalised(self) -> Tensor:
        """float32 [n, 3, H, W], what the network behind the image tower's normalisation gets of `pictures`."""
        tower = self.model.towers["image"]
        mean, std = tower.mean, tower.std
        assert isinstance(mean, Tensor)
        assert isinstance(std, Tensor)
        return (self.pixels() / 255 - mean) / std

    @torch.no_grad()
    def features(self) -> tuple[Tensor, Tensor]:
        """Of the pictures and the texts, [n, D] each, unit norm."""
        return self.model.encode("image", self.pixels()), self.model.encode("text", self.ids())


def pictures() -> list[Image.Image]:
    """Smooth noise of several sizes."""
    noise = np.random.default_rng(0)
    small = [Image.fromarray(noise.integers(0, 256, (9, 9, 3), dtype=np.uint8)) for _ in SIZES]
    return [image.resize(size, Image.Resampling.BICUBIC) for image, size in zip(small, SIZES, strict=True)]


def largest(ours: Tensor, theirs: Tensor) -> float:
    """The largest absolute difference; infinite where shapes differ or a number is none."""
    if ours.shape != theirs.shape:
        return float("inf")
    return (ours - theirs).abs().nan_to_num(nan=float("inf")).max().item()


def differences_of_logits(exported: Exported, scale: float, bias: float | None) -> dict[str, float]:
    """How far another library's scale and bias are off, as shares of ours."""
    found = {"logit scale": abs(scale / exported.logit_scale - 1)}
    if exported.logit_bias is not None or bias is not None:
        ours, theirs = exported.logit_bias or 0.0, bias or 0.0
        found["logit bias"] = abs(theirs - ours) / max(1.0, abs(ours))
    return found


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Safetensors that others may read too, as files usually are."""
    file.touch()
    mode = file.stat().st_mode
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})
    file.chmod(mode)


def read_record(
    run: Path,
    folder: Path,  # of the checkpoint
    weights: Weights = "raw",
) -> Record:
    """What the run has written down about one of its checkpoints."""
    state = checkpoint.load_state(folder)
    metrics: dict[str, float] = {}
    if (run / METRICS).exists():
        for row in map(json.loads, (run / METRICS).read_text().splitlines()):
            if row["step"] == state.step:
                kept = {k: value for k, value in row.items() if k.startswith(f"{EVAL[weights]}/")}
                metrics |= {k: value for k, value in kept.items() if value is not None}
    starts = json.loads((run / ENVIRONMENT).read_text()) if (run / ENVIRONMENT).exists() else []
    versions: dict[str, str] = {}
    if starts:
        packages = starts[-1]["packages"]
        versions = {"revision": starts[-1]["revision"] or "unknown", "python": starts[-1]["python"]}
        versions |= {
            name: packages[name] for name in ("torch", "open_clip_torch", "timm", "transformers") if name in packages
        }
    return Record(state.step, state.num_samples, state.precision, metrics, versions)
