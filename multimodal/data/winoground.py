"""Winoground: two images and two captions of the same words, in another order.

Thrush et al. 2022. A line of JSON for each: {"id", "image_0", "image_1", "caption_0", "caption_1", ...}.
"""

from collections.abc import Iterator
from pathlib import Path

from multimodal.data.choices import Choices, FileChoices, Row, caption_of, differing, value_of
from multimodal.data.files import is_image, locate
from multimodal.data.texts import read_lines
from multimodal.files import from_json


class Winoground(Choices):
    """Two choices for each line, one after the other: of its first image and of its second."""

    path: str
    """The file, examples.jsonl."""

    images: str
    """The folder of the images; one named without an ending is a .png."""

    @property
    def categories(self) -> tuple[str, ...]:
        return ("caption",)

    def build(self, root: Path) -> FileChoices:
        (path,) = locate(root, self.path)
        return FileChoices(path, root / self.images, differing(_rows(path)))


def _rows(path: Path) -> Iterator[Row]:
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        where = f"line {number}"
        record = from_json(line, f"{path}, {where}")
        names = [str(value_of(record, f"image_{i}", f"{path}, {where}")) for i in range(2)]
        captions = [caption_of(record, f"caption_{i}", f"{path}, {where}") for i in range(2)]
        for i, name in enumerate(names):
            image = name if is_image(name) else f"{name}.png"
            yield Row(where, image, captions[i], (captions[1 - i],), "caption")
