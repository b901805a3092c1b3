"""Trained models in Python: load one, embed images and texts with it, classify."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from multimodal.assemble import build
from multimodal.assemble import load as load_checkpoint
from multimodal.checkpoint import find as find_checkpoint
from multimodal.config import ModelSection
from multimodal.data.augment import Keep
from multimodal.data.files import open_image
from multimodal.data.loader import Reader
from multimodal.encoder import Encoder
from multimodal.evals.zero_shot import class_embeddings
from multimodal.interop import architectures
from multimodal.interop.weights import initialise
from multimodal.model import Model
from multimodal.step import native_precision

logger = logging.getLogger(__name__)

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "fp32", "bf16"]
Picture = Image.Image | str | Path

TEMPLATES = ("a photo of a {}.",)


class ImageTextModel:
    """A model with what its towers need to read images and texts as they are."""

    def __init__(
        self, model: Model, readers: Mapping[str, Reader], precision: Precision, batch_size: int, workers: int
    ) -> None:
        self.model = model.eval()
        self.readers = dict(readers)
        self.device: torch.device = model.logit_scale.device
        kind = native_precision(self.device) if precision == "auto" else precision
        context = torch.autocast(self.device.type, torch.bfloat16, enabled=kind == "bf16")
        self.encoder = Encoder(model, readers, context, batch_size, workers)

    @property
    def embed_dim(self) -> int:
        """D, of the shared space."""
        return self.model.embed_dim

    @property
    def logit_scale(self) -> float:
        """The multiplier of cosines."""
        return self.model.logit_scale.exp().item()

    def encode_image(
        self,
        images: Picture | Sequence[Picture] | Tensor,  # or uint8 [n, 3, H, W]
    ) -> Tensor:  # float32 [n, D] unit norm, on the CPU
        """Embed PIL images, image files, or a tensor of pixels; a single image is a batch of one.

        Each is resized and cropped as in evaluation. ValueError if a file is no image, FileNotFoundError if there is
        none.
        """
        if isinstance(images, Tensor):
            if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
                raise ValueError(f"pixels should be uint8 [n, 3, H, W], got {images.dtype} {list(images.shape)}")
        elif isinstance(images, Image.Image | str | Path):
            images = [images]
        return self._encode("image", _Pictures(images))

    def encode_text(
        self,
        texts: str | Iterable[str],
    ) -> Tensor:  # float32 [n, D] unit norm, on the CPU
        """Embed texts; a warning says how many were longer than the context and were cut."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        if wrong := [text for text in texts if not isinstance(text, str)]:
            raise ValueError(f"texts should be strings, got {type(wrong[0]).__name__}")
        return self._encode("text", texts)

    def similarity(
        self,
        images: Picture | Sequence[Picture] | Tensor,
        texts: str | Iterable[str],
    ) -> Tensor:  # float32 [n, m], cosines
        """How near every image is to every text."""
        return self.encode_image(images) @ self.encode_text(texts).T

    def classify(
        self,
        images: Picture | Sequence[Picture] | Tensor,
        names: Sequence[str],
        templates: Sequence[str] = TEMPLATES,
    ) -> Tensor:  # float32 [n, K], probabilities
        """Zero-shot classification: class names set into templates, each with one {}, are the classifier."""
        classifier = self.classifier(names, templates)
        return self.probabilities(self.encode_image(images), classifier)

    def classifier(
        self,
        names: Sequence[str],
        templates: Sequence[str] = TEMPLATES,
    ) -> Tensor:  # float32 [K, D] unit norm
        """The embeddings of classes: each the mean of its name in all templates; ValueError if names are not apart."""
        if isinstance(names, str) or isinstance(templates, str):
            raise ValueError("names and templates should be lists of strings, not one string")
        if not names or any(not name.strip() for name in names):
            raise ValueError("names should be one or more class names, none of them empty")
        name, count = Counter(names).most_common(1)[0]
        if count > 1:
            raise ValueError(f"{count} classes are named '{name}', which no prompt can tell apart")
        if wrong := [template for template in templates if template.count("{}") != 1] or not templates:
            raise ValueError(f"templates should have one {{}} each for the class name, got {wrong or templates!r}")
        prompts = [template.replace("{}", name) for name in names for template in templates]
        return class_embeddings(self.encode_text(prompts).view(len(names), len(templates), -1))

    def probabilities(
        self,
        features: Tensor,  # [n, D] of images
        classifier: Tensor,  # [K, D]
    ) -> Tensor:  # [n, K]
        """The softmax over classes of the scaled cosines."""
        return (self.logit_scale * features @ classifier.T).softmax(dim=-1)

    def _encode(self, reads: str, inputs: Sequence[Any]) -> Tensor:
        tower = next((name for name, reader in self.readers.items() if reader.reads == reads), None)
        if tower is None:
            raise ValueError(f"the model has no tower that reads {reads}; it has: {', '.join(self.readers)}")
        preprocessor = self.readers[tower].preprocessor
        before = preprocessor.num_truncated
        features = self.encoder.encode(tower, inputs)
        if truncated := preprocessor.num_truncated - before:
            logger.warning("%d of %d texts were longer than the context and were cut", truncated, len(inputs))
        return features


class _Pictures(Sequence[Any]):
    """Images, each opened when it is indexed."""

    def __init__(self, images: Sequence[Picture] | Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> Any:
        image = self.images[index]
        if isinstance(image, Tensor):
            return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
        if isinstance(image, Image.Image):
            return image
        if not isinstance(image, str | Path):
            raise ValueError(f"image {index} should be a PIL image or a path, got {type(image).__name__}")
        if not Path(image).exists():
            raise FileNotFoundError(f"there is no file '{image}'")
        return open_image(Path(image), str(image))


def load(
    path: str | Path,
    checkpoint: str | int = "last",
    device: Device = "auto",
    precision: Precision = "fp32",
    batch_size: int = 256,
    workers: int = 0,
) -> ImageTextModel:
    """The model of a run ("runs/name"), or of a checkpoint's folder; `checkpoint` is last, best, or a step of the run.

    Opening it runs none of its author's code. FileNotFoundError says what there is, ValueError what is wrong with it.
    """
    _, assembled = load_checkpoint(find(path, checkpoint), device=device, dry_run=False)
    return ImageTextModel(assembled.model, assembled.readers, precision, batch_size, workers)


def find(path: str | Path, which: str | int = "last") -> Path:
    """The folder of a checkpoint: `path` itself, or one of the run in `path`."""
    folder = Path(path)
    if (folder / "model.safetensors").exists():
        return folder
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no run or checkpoint '{folder}'")
    return find_checkpoint(folder, str(which))


def open_clip(
    architecture: str,
    weights: str | Path | None = None,
    device: Device = "auto",
    precision: Precision = "fp32",
    batch_size: int = 256,
    workers: int = 0,
) -> ImageTextModel:
    """A model of open_clip's by its name there, such as "ViT-B-32".

    `weights` is a tag ("openai"; downloaded the first time), a file, or None for random ones. ValueError, or
    FileNotFoundError, says what there is.
    """
    tagged = weights is not None and str(weights) in architectures.tags(architecture)
    described = architectures.architecture(architecture, str(weights) if tagged else None)
    section = ModelSection(**{"max_logit_scale": 100.0, "learn_logit_scale": True, **described.model})
    readers, model = build(described.towers, section, Keep(), list, None)
    if weights is not None:
        source = f"open_clip:{architecture}/{weights}" if tagged else str(weights)
        logger.info("%s", initialise(model, source, Path("runs")))
    place = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    return ImageTextModel(model.to(place), readers, precision, batch_size, workers)
