"""SugarCrepe: captions of COCO images against ones that differ in an object, an attribute or a relation.

Hsieh et al. 2023. Seven JSON files, {"0": {"filename", "caption", "negative_caption"}, ...}, about images of COCO's
val2017.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from multimodal.data.archives import read_members
from multimodal.data.choices import Choices, FileChoices, Row, caption_of, differing, value_of
from multimodal.files import from_json

CATEGORIES = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")


class SugarCrepe(Choices):
    """The seven categories of SugarCrepe."""

    path: str
    """The folder of the JSON files, or a .tar or .tar.gz with them in it."""

    images: str
    """The folder of COCO's val2017 images."""

    @property
    def categories(self) -> tuple[str, ...]:
        return CATEGORIES

    def build(self, root: Path) -> FileChoices:
        path = root / self.path
        if not (root / self.images).is_dir():
            raise FileNotFoundError(
                f"there is no folder '{self.images}' below '{root}': COCO's val2017 images go there"
            )
        texts = _packed(path) if path.is_file() else _unpacked(path)
        if missing := [category for category in CATEGORIES if category not in texts]:
            raise FileNotFoundError(f"no {'.json, '.join(missing)}.json in '{path}'")
        return FileChoices(
            path, root / self.images, differing(row for name in CATEGORIES for row in _rows(name, texts))
        )


def _unpacked(folder: Path) -> dict[str, bytes]:
    return {file.stem: file.read_bytes() for file in folder.glob("*.json")}


def _packed(path: Path) -> dict[str, bytes]:
    """The JSON files in a tar file, in whichever folder there."""
    _, found = read_members(path, lambda name: name.endswith(".json"))
    return {Path(name).stem: raw for name, raw in found.items()}


def _rows(category: str, texts: Mapping[str, bytes]) -> Iterator[Row]:
    records = from_json(texts[category], f"{category}.json")
    if not isinstance(records, dict) or not records:
        raise ValueError(f"{category}.json should be a mapping from numbers to records, got {records!r:.80}")
    for number, record in records.items():
        where = f"{category}.json {number}"
        image = str(value_of(record, "filename", where))
        right, wrong = (caption_of(record, field, where) for field in ("caption", "negative_caption"))
        yield Row(where, image, right, (wrong,), category)
