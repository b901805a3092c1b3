"""Images, each with captions that are right and others that are wrong: what tests of compositionality are made of."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from multimodal.batch import Sample
from multimodal.data.files import check_images, open_image, read_captions
from multimodal.parts import Dataset, Source, did_you_mean

Box = tuple[int, int, int, int]
"""Left, top, right, bottom, in pixels."""


class Choice(NamedTuple):
    """A caption to be told from wrong ones."""

    image: int
    """The place of its image in the source."""
    right: str
    wrong: tuple[str, ...]
    category: str


class ChoiceSource(Source):
    """Images, each once, and the choices to be made about them."""

    choices: Sequence[Choice]

    def captions(self, index: int) -> tuple[str, ...]:
        """The right ones of an image, each once."""
        return tuple(self._right.get(index, ()))

    @cached_property
    def _right(self) -> dict[int, dict[str, None]]:
        found: dict[int, dict[str, None]] = {}
        for choice in self.choices:
            found.setdefault(choice.image, {})[choice.right] = None
        return found


class Choices(Dataset):
    """A dataset of choices."""

    @property
    @abstractmethod
    def categories(self) -> tuple[str, ...]:
        """Kinds of its choices."""

    @abstractmethod
    def build(self, root: Path) -> ChoiceSource: ...


class Row(NamedTuple):
    """A choice as a table has it."""

    where: str
    """Its place in the table, for messages: "swap_att.json 12"."""
    image: str
    """The file, relative to the folder of images."""
    right: str
    wrong: tuple[str, ...]
    category: str
    box: Box | None = None
    """The part of the image that it is about."""


class FileChoices(ChoiceSource):
    """Choices about image files, or about boxes in them."""

    def __init__(self, path: Path, folder: Path, rows: Sequence[Row]) -> None:
        if not rows:
            raise ValueError(f"{path}: no rows")
        named: dict[str, str] = {}
        for row in rows:
            named.setdefault(row.image, row.where)
            if Path(row.image).is_absolute() or ".." in Path(row.image).parts:
                raise ValueError(f"{row.where}: '{row.image}' leads out of the folder of images, '{folder}'")
        check_images(path, folder, named)
        places: dict[tuple[str, Box | None], int] = {}
        self.choices = [
            Choice(places.setdefault((row.image, row.box), len(places)), row.right, row.wrong, row.category)
            for row in rows
        ]
        self.name, self.folder, self.images = path.name, folder, list(places)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        name, box = self.images[index]
        image = open_image(self.folder / name, self.key(index))
        return Sample(self.key(index), {"image": image if box is None else image.crop(box)})

    def key(self, index: int) -> str:
        name, box = self.images[index]
        return f"{self.name}/{name}" if box is None else f"{self.name}/{name} {list(box)}"


# --- reading --------------------------------------------------------------------------------------------------------


def caption_of(record: Mapping[str, Any], field: str, where: str) -> str:
    """The one caption in a field of a record; ValueError, saying where, if there is none."""
    try:
        captions = read_captions(value_of(record, field, where))
    except ValueError as error:
        raise ValueError(f"{where}, {field}: {error}" if where not in str(error) else str(error)) from None
    if len(captions) != 1:
        raise ValueError(f"{where}: '{field}' should be one caption, got {record[field]!r:.80}")
    return captions[0]


def value_of(record: object, field: str, where: str) -> Any:
    """What a field of a record holds; ValueError, saying where, if it has no such field."""
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: should be a mapping with the field '{field}', got {record!r:.80}")
    if field not in record:
        raise ValueError(
            f"{where}: no field '{field}', only {', '.join(map(str, record))}.{did_you_mean(field, map(str, record))}"
        )
    return record[field]


def differing(rows: Iterable[Row]) -> list[Row]:
    """The rows; ValueError where a wrong caption is the right one."""
    found = list(rows)
    for row in found:
        if row.right in row.wrong:
            raise ValueError(f"{row.where}: the wrong caption is the right one, '{row.right:.80}'")
    return found
