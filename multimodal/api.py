"""Trained models in Python: load one, embed images and texts with it, classify."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from PIL import Image
from torch import Tensor

from multimodal.assemble import build, device_of, native_precision
from multimodal.assemble import load as load_checkpoint
from multimodal.checkpoint import find as find_checkpoint
from multimodal.config import ModelSection, RunError, Weights
from multimodal.data.augment import Keep
from multimodal.data.files import open_image
from multimodal.data.loader import Reader
from multimodal.encoder import Encoder
from multimodal.evals.zero_shot import class_embeddings
from multimodal.interop import architectures
from multimodal.interop.cfg_to_towers import Architecture
from multimodal.interop.weights import initialise
from multimodal.model import Model
from multimodal.parts import BadSample
from multimodal.resolve import did_you_mean

logger = logging.getLogger(__name__)

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "fp32", "bf16"]
Picture = Image.Image | str | Path | Tensor
"""A PIL image, a file, or pixels: uint8 [3, H, W]."""

TEMPLATES = ("a photo of a {}.",)


class ImageTextModel:
    """A model with what its towers need to read images and texts as they are."""

    def __init__(
        self,
        model: Model,
        readers: Mapping[str, Reader],
        origin: str,  # where the weights are from, for messages
        precision: Precision,
        batch_size: int,
        workers: int,
    ) -> None:
        if precision not in get_args(Precision):
            raise ValueError(f"precision should be {', '.join(get_args(Precision))}, got {precision!r}")
        self.origin = origin
        self.model = model.eval()
        self.readers = dict(readers)
        self.device: torch.device = model.logit_scale.device
        self.precision = native_precision(self.device) if precision == "auto" else precision
        context = torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")
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
        images: Picture | Iterable[Picture],  # a tensor: uint8 [n, 3, H, W]
    ) -> Tensor:  # float32 [n, D] unit norm, on the CPU
        """Embed PIL images, image files, or pixels; a single image is a batch of one.

        Each is brought to RGB, resized and cropped as in evaluation, without heed to EXIF orientation, as in
        open_clip. ValueError if a file is no image, FileNotFoundError if there is none.
        """
        return self.encoder.encode(self.tower("image"), _Pictures(images))

    def encode_text(
        self,
        texts: str | Iterable[str],
    ) -> Tensor:  # float32 [n, D] unit norm, on the CPU
        """Embed texts; a warning says how many were longer than the context and were cut."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        if wrong := [text for text in texts if not isinstance(text, str)]:
            raise ValueError(f"texts should be strings, got {type(wrong[0]).__name__}")
        tower = self.tower("text")
        with self.count_truncated(tower, len(texts)):
            return self.encoder.encode(tower, texts)

    def encode_readable(
        self,
        tower: str,
        inputs: Sequence[Any],  # as `encode_image` and `encode_text` take them, each read when it is indexed
    ) -> tuple[Tensor, dict[int, str]]:  # float32 [n, D]; by place, what is wrong
        """Embed with a tower, by its name, what can be read; the rows of broken images and missing files are NaN.

        RunError if the model itself gives features that are not finite.
        """
        reads = self.readers[tower].reads
        with self.count_truncated(tower, len(inputs)):
            features, broken = self.encoder.encode_readable(tower, _Pictures(inputs) if reads == "image" else inputs)
        wrong = [
            place for place in (~features.isfinite().all(dim=1)).nonzero().flatten().tolist() if place not in broken
        ]
        if wrong:
            raise RunError(
                f"{self.origin} gives features that are not finite, for {len(wrong)} of {len(inputs)} inputs"
            )
        return features, broken

    def similarity(
        self,
        images: Picture | Iterable[Picture],
        texts: str | Iterable[str],
    ) -> Tensor:  # float32 [n, m], cosines
        """How near every image is to every text."""
        return self.encode_image(images) @ self.encode_text(texts).T

    def classify(
        self,
        images: Picture | Iterable[Picture],
        names: Iterable[str],
        templates: Iterable[str] = TEMPLATES,
    ) -> Tensor:  # float32 [n, K], probabilities
        """Zero-shot classification: class names set into templates, each with one {}, are the classifier."""
        classifier = self.classifier(names, templates)
        return self.probabilities(self.encode_image(images), classifier)

    def classifier(
        self,
        names: Iterable[str],
        templates: Iterable[str] = TEMPLATES,
    ) -> Tensor:  # float32 [K, D] unit norm
        """The embeddings of classes: each the mean of its name in all templates; ValueError if names are not apart."""
        names, templates = _list(names, "names"), _list(templates, "templates")
        require_distinct(names)
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

    def tower(self, reads: str) -> str:
        """The name of the first tower that reads "image" or "text"; ValueError if there is none."""
        for name, reader in self.readers.items():
            if reader.reads == reads:
                return name
        raise ValueError(f"the model has no tower that reads {reads}; it has: {', '.join(self.readers)}")

    @contextmanager
    def count_truncated(self, tower: str, count: int) -> Iterator[None]:
        """Warn of texts that are cut inside."""
        preprocessor = self.readers[tower].preprocessor
        before = preprocessor.num_truncated
        yield
        if truncated := preprocessor.num_truncated - before:
            logger.warning("%d of %d texts were longer than the context and were cut", truncated, count)


def require_distinct(names: Sequence[str]) -> Sequence[str]:
    """The class names, if a prompt can tell them apart; else ValueError."""
    if not names or any(not name.strip() for name in names):
        raise ValueError("names should be one or more class names, none of them empty")
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{count} classes are named '{name}', which no prompt can tell apart")
    return names


def _list(strings: Iterable[str], what: str) -> list[str]:
    if isinstance(strings, str):
        raise ValueError(f"{what} should be a list of strings, not one string")
    return list(strings)


class _Pictures(Sequence[Image.Image]):
    """Images in RGB, each opened when it is indexed."""

    def __init__(self, images: Picture | Iterable[Picture]) -> None:
        self.images: Sequence[Picture] | Tensor
        if isinstance(images, Tensor) and images.ndim == 4:
            self.images = _pixels(images, "pixels", 4)
        elif isinstance(images, Tensor | Image.Image | str | Path):
            self.images = [_ready(images, 0)]
        elif isinstance(images, Sequence) and not isinstance(images, list | tuple):
            self.images = images
        else:
            self.images = [_ready(image, place) for place, image in enumerate(images)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> Any:
        image = _ready(self.images[index], index)
        if isinstance(image, Tensor):
            return Image.fromarray(image.permute(1, 2, 0).numpy())
        if isinstance(image, Image.Image):
            return open_image(image, f"image {index}")
        if not Path(image).exists():
            raise FileNotFoundError(f"there is no file '{image}'")
        return open_image(Path(image), str(image))


def _ready(image: Picture, place: int) -> Picture:
    """An image that may be sent to another process: pixels on the CPU, a file that Pillow has opened read."""
    if isinstance(image, Tensor):
        return _pixels(image, f"image {place}", 3)
    if isinstance(image, Image.Image):
        try:
            image.load()
        except Exception as error:
            raise BadSample(f"image {place}: {error}") from None
    elif not isinstance(image, str | Path):
        hint = "; Image.fromarray makes one of an array" if hasattr(image, "__array__") else ""
        raise ValueError(f"image {place} should be a PIL image, a path or a tensor, got {type(image).__name__}{hint}")
    return image


def _pixels(tensor: Tensor, what: str, ndim: int) -> Tensor:
    shape = "[n, 3, H, W]" if ndim == 4 else "[3, H, W]"
    if tensor.dtype != torch.uint8 or tensor.ndim != ndim or tensor.shape[-3] != 3:
        raise ValueError(f"{what} should be uint8 {shape}, got {tensor.dtype} {list(tensor.shape)}")
    return tensor.cpu()


def load(
    path: str | Path,
    checkpoint: str | int = "last",
    device: Device = "auto",
    precision: Precision = "fp32",
    batch_size: int = 256,
    workers: int = 0,
    weights: Weights = "raw",
) -> ImageTextModel:
    """The model of a run ("runs/name"), or of a checkpoint's folder; `checkpoint` is last, best, or a step of the run.

    `weights` are those of that step, or, where the run has kept it, their running mean ("ema").
    Opening it runs none of its author's code. FileNotFoundError says what there is, ValueError what is wrong with it.
    """
    folder = find(path, checkpoint)
    _, assembled = load_checkpoint(folder, weights, device=device, dry_run=False)
    return ImageTextModel(assembled.model, assembled.readers, str(folder), precision, batch_size, workers)


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
    place = device_of(device)
    described, tagged = describe_open_clip(architecture, weights)
    section = ModelSection(**{"max_logit_scale": 100.0, "learn_logit_scale": True, **described.model})
    readers, model = build(described.towers, section, Keep(), list, None)
    if weights is not None:
        source = f"open_clip:{architecture}/{weights}" if tagged else str(weights)
        logger.info("%s", initialise(model, source, Path("runs")))
    origin = architecture if weights is None else f"{architecture}/{weights}"
    return ImageTextModel(model.to(place), readers, origin, precision, batch_size, workers)


def describe_open_clip(architecture: str, weights: str | Path | None) -> tuple[Architecture, bool]:
    """An architecture of open_clip's in our terms, and whether its weights are a tag; ValueError says what there is."""
    known = architectures.tags(architecture)
    tagged = weights is not None and str(weights) in known
    described = architectures.architecture(architecture, str(weights) if tagged else None)
    if weights is not None and not tagged and not Path(weights).exists():
        have, near = ", ".join(known) or "none", did_you_mean(str(weights), known)
        raise ValueError(f"weights '{weights}' are no file, and no tag of {architecture}; tags are: {have}.{near}")
    return described, tagged
