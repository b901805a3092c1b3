"""Labelled images in one .npz file, for classification as image-text data."""

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray
from PIL import Image

from multimodal.data.files import ClassNames, LabelledSource, Templates, locate, open_image
from multimodal.parts import Dataset, did_you_mean


class Arrays(Dataset):
    """An .npz of `image` uint8 [N, H, W, 3] or [N, H, W], or of `jpeg` and `offset`; and `label`, `class_names`.

    `jpeg` uint8 is N encoded images end to end, number i from `offset[i]` to `offset[i + 1]`, decoded when it is read.
    """

    path: str
    """The .npz file."""

    templates: Templates = ("a photo of a {}.",)
    """Captions of an image, {} standing for the name of its class; training draws one of them per step."""

    class_names: ClassNames | None = None
    """Names by label, underscores for spaces; null for those in the file."""

    def build(self, root: Path) -> "ArraySource":
        (path,) = locate(root, self.path)
        if not zipfile.is_zipfile(path):
            raise ValueError(f"{path}: not an .npz file")
        with np.load(path, allow_pickle=False) as file:
            return _open(path, file, self.class_names, self.templates)


class ArraySource(LabelledSource):
    """Images that lie in memory, as pixels or encoded."""

    def __init__(
        self,
        path: Path,
        images: NDArray[Any],  # uint8 [N, H, W, 3], [N, H, W], or [bytes] encoded
        offsets: NDArray[Any] | None,  # integers [N + 1] into encoded images
        labels: NDArray[Any],  # integers [N]
        class_names: Sequence[str],
        templates: Sequence[str],
    ) -> None:
        super().__init__(path, labels, class_names, templates)
        self.images, self.offsets = images, offsets

    def key(self, index: int) -> str:
        return f"{self.path.name}/{index}"

    def image(self, index: int) -> Image.Image:
        if self.offsets is None:
            return Image.fromarray(self.images[index]).convert("RGB")
        return open_image(self.images[self.offsets[index] : self.offsets[index + 1]].tobytes(), self.key(index))


def _open(path: Path, file: NpzFile, class_names: Sequence[str] | None, templates: Sequence[str]) -> ArraySource:
    labels = _read(path, file, "label")
    _require(labels.ndim == 1 and labels.dtype.kind in "iu" and len(labels) > 0, path, "label", "integers [N]", labels)
    names = [str(name) for name in _read(path, file, "class_names").tolist()] if class_names is None else class_names
    if "image" in file.files or "jpeg" not in file.files:
        images = _read(path, file, "image")
        shaped = images.dtype == np.uint8 and (images.ndim == 3 or images.shape[3:] == (3,))
        _require(shaped, path, "image", "uint8 [N, H, W, 3] or [N, H, W]", images)
        _require(len(images) == len(labels), path, "image", f"as long as `label` ({len(labels)})", images)
        return ArraySource(path, images, None, labels, names, templates)
    images, offsets = _read(path, file, "jpeg"), _read(path, file, "offset")
    _require(images.dtype == np.uint8 and images.ndim == 1, path, "jpeg", "uint8 [bytes]", images)
    whole = offsets.dtype.kind in "iu" and offsets.shape == (len(labels) + 1,)
    _require(whole, path, "offset", f"integers [{len(labels) + 1}], one more than `label`", offsets)
    inside = offsets[0] >= 0 and offsets[-1] <= len(images) and bool((offsets[:-1] <= offsets[1:]).all())
    _require(inside, path, "offset", f"rising, within the {len(images)} bytes of `jpeg`", offsets)
    return ArraySource(path, images, offsets, labels, names, templates)


def _read(path: Path, file: NpzFile, key: str) -> NDArray[Any]:
    if key not in file.files:
        knob = " or set the knob `class_names`" if key == "class_names" else ""
        raise ValueError(
            f"{path}: no array '{key}'{knob}; it has {', '.join(file.files)}.{did_you_mean(key, file.files)}"
        )
    try:
        return file[key]
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: the array '{key}' cannot be read: {error}") from None


def _require(held: bool, path: Path, key: str, what: str, array: NDArray[Any]) -> None:
    if not held:
        raise ValueError(f"{path}: `{key}` should be {what}, got {array.dtype} {list(array.shape)}")
