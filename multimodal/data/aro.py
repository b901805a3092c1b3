"""ARO's parts from Visual Genome: which of two objects does what to the other, and which has which attribute.

Yuksekgonul et al. 2023. Lists of {"image_path", "bbox_x", "bbox_y", "bbox_w", "bbox_h", "true_caption",
"false_caption", ...}; the image is the box.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from multimodal.data.choices import Box, Choices, FileChoices, Row, caption_of, differing, value_of
from multimodal.data.files import locate
from multimodal.files import from_json


class Aro(Choices):
    """VG-Relation and VG-Attribution; each is a category.

    Its accuracy is the share of all its choices that are right. The authors' is macro: the accuracy of each relation
    (`relation_name`) by itself, averaged over relations, without those that their notebook lists as symmetric; and of
    each pair of `attributes` that is there 25 times or more, averaged over pairs. There a rare relation counts as much
    as "to the right of"; here each choice counts as one, and symmetric relations, of which both captions are true, pull
    towards a half: the paper's numbers are others. Ties are wrong in both.
    """

    path: str
    """The folder of the files."""

    images: str = "images"
    """The folder of the images, relative to `path`."""

    relation: str | None = "visual_genome_relation.json"
    """The list of VG-Relation; null for none."""

    attribution: str | None = "visual_genome_attribution.json"
    """The list of VG-Attribution; null for none."""

    @property
    def categories(self) -> tuple[str, ...]:
        return tuple(name for name in ("relation", "attribution") if getattr(self, name) is not None)

    def build(self, root: Path) -> FileChoices:
        if not self.categories:
            raise ValueError("relation and attribution are both null: nothing is left")
        folder = root / self.path
        paths = locate(folder, *(getattr(self, name) for name in self.categories))
        rows = (row for category, path in zip(self.categories, paths, strict=True) for row in _rows(category, path))
        return FileChoices(folder, folder / self.images, differing(rows))


def _rows(category: str, path: Path) -> Iterator[Row]:
    records = from_json(path.read_bytes(), str(path))
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path} should be a list of records, got {records!r:.80}")
    for number, record in enumerate(records):
        where = f"{path.name} {number}"
        image = str(value_of(record, "image_path", where))
        right, wrong = (caption_of(record, field, where) for field in ("true_caption", "false_caption"))
        yield Row(where, image, right, (wrong,), category, _box(record, where))


def _box(record: Any, where: str) -> Box:
    left, top, width, height = (value_of(record, f"bbox_{side}", where) for side in "xywh")
    if not all(isinstance(value, int | float) for value in (left, top, width, height)) or min(width, height) < 1:
        raise ValueError(f"{where}: bbox_x, bbox_y, bbox_w, bbox_h are no box: {[left, top, width, height]}")
    return round(left), round(top), round(left + width), round(top + height)
