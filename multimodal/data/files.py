"""What the sources that read files share: finding files, opening images, reading captions, naming classes."""

import io
import os
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from pydantic import AfterValidator, Field, Strict
from tqdm import tqdm

from multimodal.batch import Sample
from multimodal.parts import BadSample, Source

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
"""Endings of image files, in any case; in a shard the first of them that a key has is its image."""

NUM_SHOWN = 5  # missing files that an error names


def locate(root: Path, *names: str) -> list[Path]:
    """The files of these names below `root` (or absolute); one error names the first that are missing, of all."""
    paths = [root / name for name in names]
    missing = [name for name, path in zip(names, paths, strict=True) if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{len(missing)} of {len(names)} files are missing below '{root}': {_first(missing)}")
    return paths


def _first(names: list[str]) -> str:
    return ", ".join(names[:NUM_SHOWN]) + (f", and {len(names) - NUM_SHOWN} more" if len(names) > NUM_SHOWN else "")


def check_images(path: Path, folder: Path, named: Mapping[str, str]) -> None:
    """One error for all image files that are not there; `named` says where the table at `path` names each first."""
    bar = tqdm(named.items(), desc="Looking for images", unit="image", delay=2, disable=None)
    missing = [f"{where}: '{image}'" for image, where in bar if not os.path.isfile(folder / image)]
    if missing:
        shown = _first(missing)
        raise ValueError(f"{path}: {len(missing)} of {len(named)} images are missing below '{folder}' ({shown})")


def is_image(name: str) -> bool:
    """Whether a file is an image by its ending."""
    return name.lower().endswith(tuple(f".{suffix}" for suffix in IMAGE_SUFFIXES))


def image_files(folder: Path, below: str = ".") -> Iterator[str]:
    """Paths, relative to `folder`, of all images in its subfolder `below`, at any depth."""
    for place, _, names in os.walk(folder / below, followlinks=True):
        within = os.path.relpath(place, folder)
        yield from (os.path.normpath(f"{within}/{name}") for name in names if is_image(name))


class PackedStrings(Sequence[str]):
    """Strings end to end in one array, whose memory processes share (reading a list copies its pages)."""

    def __init__(self, strings: Iterable[str]) -> None:
        encoded = [string.encode("utf-8", "surrogatepass") for string in strings]
        self.ends = np.cumsum([0, *map(len, encoded)])
        self.bytes = np.frombuffer(b"".join(encoded), np.uint8)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"there is no sample {index} among {len(self)}")
        return self.bytes[self.ends[index] : self.ends[index + 1]].tobytes().decode("utf-8", "surrogatepass")


class ImageFiles(Sequence[Path]):
    """An image, or all images below a folder, sorted; FileNotFoundError or ValueError if there are none."""

    def __init__(self, place: Path) -> None:
        self.folder, suffixes = place, ", ".join(IMAGE_SUFFIXES)
        if place.is_file():
            if not is_image(place.name):
                raise ValueError(f"'{place}' is no image ({suffixes})")
            self.folder, self.names = place.parent, PackedStrings([place.name])
        elif place.is_dir():
            self.names = PackedStrings(sorted(image_files(place)))
        else:
            raise FileNotFoundError(f"there is no image or folder of images '{place}'")
        if not len(self.names):
            raise ValueError(f"'{place}' has no images ({suffixes}) in it")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Any) -> Any:
        return self.folder / self.names[index]


# --- samples --------------------------------------------------------------------------------------------------------


def open_image(file: bytes | Path | Image.Image, key: str) -> Image.Image:
    """The image, decoded, in RGB; alpha is dropped as in CLIP, EXIF orientation ignored; BadSample, naming `key`.

    Of an animation it is the first frame, and 16 bits become 8.
    """
    try:
        if isinstance(file, Image.Image):
            return _rgb(file)
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            return _rgb(image)
    except UnidentifiedImageError:
        raise BadSample(f"{key}: not an image that Pillow can read") from None
    except Exception as error:  # decoders raise SyntaxError, struct.error, DecompressionBombError and more
        raise BadSample(f"{key}: {error or type(error).__name__}") from None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # which Pillow would clip to white
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):  # likewise
        raise ValueError(f"pixels of Pillow's mode {image.mode} have no range that says what is white")
    return image.convert("RGB")


def read_captions(value: object) -> tuple[str, ...]:
    """The captions in a string or a list of strings, stripped and without the empty ones."""
    captions = [value] if isinstance(value, str) else value
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"captions should be a string or a list of strings, got {value!r:.80}")
    stripped = (caption.strip() for caption in captions)
    return tuple(caption.encode("utf-8", "replace").decode() for caption in stripped if caption)  # no lone surrogates


def make_sample(key: str, file: bytes | Path, captions: tuple[str, ...]) -> Sample:
    """An image and its captions; BadSample where the image is broken or no caption is left."""
    if not captions:
        raise BadSample(f"{key}: no caption, or only empty ones")
    return Sample(key, {"image": open_image(file, key), "text": captions})


# --- classes --------------------------------------------------------------------------------------------------------


def one_slot(template: str) -> str:
    """The template, if it has one place for a name; else ValueError."""
    if template.count("{}") != 1:
        raise ValueError(f"a template should contain {{}} exactly once, for the name of the class, got '{template}'")
    return template


Templates = Annotated[tuple[Annotated[str, AfterValidator(one_slot)], ...], Strict(False), Field(min_length=1)]
ClassNames = Annotated[tuple[str, ...], Strict(False), Field(min_length=1)]


class LabelledSource(Source):
    """Images of classes; the captions are the templates, each filled in with the name of the image's class."""

    def __init__(
        self,
        path: Path,
        labels: NDArray[Any],  # integers [N]
        class_names: Iterable[str],
        templates: Sequence[str],
    ) -> None:
        self.path, self.labels = path, labels
        self.class_names = tuple(name.replace("_", " ").strip() for name in class_names)
        if not all(self.class_names):
            raise ValueError(f"{path}: `class_names` is empty for the label {self.class_names.index('')}")
        outside = (labels < 0) | (labels >= len(self.class_names))
        if outside.any():
            first = int(outside.argmax())
            raise ValueError(
                f"{path}: `label` {first} is {labels[first]}, beyond the {len(self.class_names)} class names"
            )
        self.texts: list[tuple[str, ...]] = [
            tuple(template.replace("{}", name) for template in templates) for name in self.class_names
        ]  # K x T

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        inputs = {"image": self.image(index), "text": self.captions(index)}
        return Sample(self.key(index), inputs, int(self.labels[index]))

    def captions(self, index: int) -> tuple[str, ...]:
        return self.texts[int(self.labels[index])]

    def label(self, index: int) -> int:
        return int(self.labels[index])

    @abstractmethod
    def key(self, index: int) -> str:
        """Where the sample comes from, for messages."""

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """The decoded image, in RGB; BadSample if it is broken."""
