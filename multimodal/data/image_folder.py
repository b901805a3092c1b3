"""Labelled images in folders, one for each class."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from multimodal.data.files import (
    IMAGE_SUFFIXES,
    ClassNames,
    LabelledSource,
    PackedStrings,
    Templates,
    image_files,
    open_image,
)
from multimodal.parts import Dataset


class ImageFolder(Dataset):
    """Images in one folder a class, at any depth in it (jpg, jpeg, png, webp); hidden folders are left out."""

    path: str
    """The folder of the class folders."""

    templates: Templates = ("a photo of a {}.",)
    """Captions of an image, {} standing for the name of its class; training draws one of them per step."""

    class_names: ClassNames | None = None
    """Names for the class folders, sorted, underscores for spaces; null for the folders' own names."""

    def build(self, root: Path) -> "FolderSource":
        folder = root / self.path
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder '{self.path}' below '{root}'")
        classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
        if not classes:
            raise ValueError(f"{folder}: no folders in it, where one for each class is wanted")
        if self.class_names is not None and len(self.class_names) != len(classes):
            raise ValueError(f"{folder}: {len(classes)} class folders, but {len(self.class_names)} `class_names`")
        return FolderSource(folder, classes, self.class_names or classes, self.templates)


class FolderSource(LabelledSource):
    """Images by class folder, then by path."""

    def __init__(
        self, folder: Path, classes: Sequence[str], class_names: Sequence[str], templates: Sequence[str]
    ) -> None:
        files = [sorted(image_files(folder, name)) for name in classes]
        empty = [name for name, found in zip(classes, files, strict=True) if not found]
        if empty:
            raise ValueError(f"{folder}: no images ({', '.join(IMAGE_SUFFIXES)}) in the class folders {empty}")
        labels = np.repeat(np.arange(len(classes)), [len(found) for found in files])
        super().__init__(folder, labels, class_names, templates)
        self.files = PackedStrings(path for found in files for path in found)

    def key(self, index: int) -> str:
        return f"{self.path.name}/{self.files[index]}"

    def image(self, index: int) -> Image.Image:
        return open_image(self.path / self.files[index], self.key(index))
