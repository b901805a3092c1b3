"""Data sets in the form of LAION's CLIP_benchmark: shards with a list of class names and one of templates beside them.

FOLDER/
    classnames.txt                        one a line, by label
    zeroshot_classification_templates.txt one a line, {c} for the class name
    dataset_type.txt                      "multilabel" or "retrieval"; without it, classification
    test/nshards.txt                      how many shards there are
    test/0.tar, 1.tar, ...                key.webp (jpg, jpeg, png) and key.cls, key.npy or key.txt
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import AfterValidator

from multimodal.batch import Sample
from multimodal.data.files import LabelledSource, locate, make_sample, open_image, read_captions
from multimodal.data.prompts import read_templates
from multimodal.data.tars import Tars
from multimodal.data.texts import lines_of, read_lines
from multimodal.parts import Dataset, Source, did_you_mean

LABEL, LABELS, TEXT = "cls", "npy", "txt"
HOLDS = {"classification": LABEL, "multilabel": LABELS, "retrieval": TEXT}
"""What is beside an image, by the type of the data set."""

CLASS_NAMES, TEMPLATES, TYPE = "classnames.txt", "zeroshot_classification_templates.txt", "dataset_type.txt"
NUM_SHARDS = "nshards.txt"


def _one_folder(name: str) -> str:
    if not name or Path(name).name != name:
        raise ValueError(f"should be the name of a folder in the data set's own, such as test, got '{name}'")
    return name


class ClipBenchmark(Dataset):
    """A data set of CLIP_benchmark (`wds_*` on Hugging Face, or of its `clip_benchmark_export_wds`): one split of it.

    Images with a class, with any number of classes, or with captions, as `dataset_type.txt` says.
    """

    path: str
    """The folder with `classnames.txt`."""

    split: Annotated[str, AfterValidator(_one_folder)] = "test"
    """The folder with `nshards.txt` in it."""

    def build(self, root: Path) -> Source:
        folder = root / self.path
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder '{self.path}' below '{root}'")
        kind = _type(folder)
        tars = Tars(_shards(folder, self.split), tuple(HOLDS.values()))
        _require(tars, kind)
        if kind == "retrieval":
            return CaptionedTars(tars)
        class_names, templates = _lines(folder / CLASS_NAMES), read_templates(folder / TEMPLATES)
        if kind == "multilabel":
            return MultiLabelTars(tars, class_names, templates)
        labels = np.array([_label(tars, index) for index in range(len(tars))])
        return ClassifiedTars(folder / self.split, tars, labels, class_names, templates)


class ClassifiedTars(LabelledSource):
    """Images of one class each."""

    def __init__(
        self, path: Path, tars: Tars, labels: NDArray[Any], class_names: Sequence[str], templates: Sequence[str]
    ) -> None:
        outside = (labels < 0) | (labels >= len(class_names))
        if outside.any():
            first = int(outside.argmax())
            raise ValueError(
                f"{path}: {tars.name(first)}.{LABEL} is {labels[first]}, beyond the {len(class_names)} names in "
                f"{CLASS_NAMES}, which should have one for each label from 0"
            )
        super().__init__(path, labels, class_names, templates)
        self.tars, self.templates = tars, tuple(templates)

    def key(self, index: int) -> str:
        return self.tars.name(index)

    def image(self, index: int) -> Image.Image:
        return open_image(self.tars.read(index), self.key(index))


class MultiLabelTars(Source):
    """Images of any number of classes; the captions are the templates, with the name of each class in turn."""

    def __init__(self, tars: Tars, class_names: Sequence[str], templates: Sequence[str]) -> None:
        self.tars, self.class_names, self.templates = tars, tuple(class_names), tuple(templates)
        rows = [_labels(tars, index, len(class_names)) for index in range(len(tars))]
        self.ends = np.cumsum([0, *map(len, rows)])  # int64 [N + 1]
        self.labels = np.concatenate(rows)  # of all samples, end to end

    def __len__(self) -> int:
        return len(self.tars)

    def __getitem__(self, index: int) -> Sample:
        image = open_image(self.tars.read(index), self.key(index))
        return Sample(self.key(index), {"image": image, "text": self.captions(index)})

    def captions(self, index: int) -> tuple[str, ...]:
        names = [self.class_names[label] for label in self.labels_of(index)]
        return tuple(template.replace("{}", name) for name in names for template in self.templates)

    def key(self, index: int) -> str:
        return self.tars.name(index)

    def labels_of(self, index: int) -> tuple[int, ...]:
        return tuple(self.labels[self.ends[index] : self.ends[index + 1]].tolist())


class CaptionedTars(Source):
    """Images with captions."""

    def __init__(self, tars: Tars) -> None:
        self.tars = tars
        for index in range(len(tars)):
            if not self.captions(index):
                raise ValueError(f"{self.key(index)}.{TEXT} has no caption in it, where one a line is wanted")

    def __len__(self) -> int:
        return len(self.tars)

    def __getitem__(self, index: int) -> Sample:
        return make_sample(self.key(index), self.tars.read(index), self.captions(index))

    def captions(self, index: int) -> tuple[str, ...]:
        return read_captions(lines_of(_text(self.tars, index, TEXT)))

    def key(self, index: int) -> str:
        return self.tars.name(index)


# --- files beside the shards ----------------------------------------------------------------------------------------


def _type(folder: Path) -> str:
    path = folder / TYPE
    if not path.is_file():
        return "classification"
    kind = " ".join(read_lines(path)).strip().lower()
    if kind not in HOLDS:
        hint = did_you_mean(kind, HOLDS)
        raise ValueError(f"{path} should say one of {', '.join(HOLDS)}, it says '{kind:.40}'.{hint}")
    return kind


def _shards(folder: Path, split: str) -> list[Path]:
    """The tar files of a split; ValueError unless they are as many as `nshards.txt` says."""
    if not (folder / split).is_dir():
        splits = [entry.parent.name for entry in sorted(folder.glob(f"*/{NUM_SHARDS}"))]
        raise FileNotFoundError(f"there is no split '{split}' in '{folder}', which has {', '.join(splits) or 'none'}")
    (path,) = locate(folder / split, NUM_SHARDS)
    said = path.read_text().strip()
    if not said.isdecimal() or int(said) == 0:
        raise ValueError(f"{path} should be the number of shards, it is '{said:.40}'")
    found = {file.name for file in path.parent.glob("*.tar")}
    names = [f"{number}.tar" for number in range(min(int(said), len(found) + 1))]
    if found != set(names) or len(names) != int(said):
        differ = [f"{name} is missing" for name in names if name not in found][:3]
        differ += [f"{name} is not one of them" for name in sorted(found - set(names))][:3]
        raise ValueError(f"{path} says {said} shards, from 0.tar on, but {len(found)} are there: {', '.join(differ)}")
    return [path.parent / name for name in names]


def _lines(path: Path) -> list[str]:
    """The lines of a file, stripped, up to the last one that has something in it."""
    lines = [line.strip() for line in read_lines(path)]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise ValueError(f"{path} is empty")
    return lines


# --- members --------------------------------------------------------------------------------------------------------


def _require(tars: Tars, kind: str) -> None:
    """ValueError for the first key without the member that its type of data set has beside each image."""
    wanted = HOLDS[kind]
    lacking = ~tars.has(wanted)
    if not lacking.any():
        return
    first = int(lacking.argmax())
    others = [f"{other}, as '{name}'" for name, other in HOLDS.items() if tars.has(other)[first]]
    has = f"; it has key.{others[0]} in {TYPE} would have" if others else ""
    raise ValueError(
        f"{tars.name(first)}: no key.{wanted} beside its image, which a data set of type '{kind}' has{has}"
        f" ({int(lacking.sum())} of {len(tars)} images are without)"
    )


def _text(tars: Tars, index: int, suffix: str) -> str:
    try:
        return tars.read(index, suffix).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{tars.name(index)}.{suffix} is not UTF-8 text ({error})") from None


def _label(tars: Tars, index: int) -> int:
    text = _text(tars, index, LABEL).strip()
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{tars.name(index)}.{LABEL} should be an integer, got '{text:.40}'") from None


def _labels(tars: Tars, index: int, num_classes: int) -> NDArray[np.int64]:
    """Where the vector of a sample is 1."""
    name = f"{tars.name(index)}.{LABELS}"
    try:
        vector = np.load(io.BytesIO(tars.read(index, LABELS)), allow_pickle=False)
    except (ValueError, OSError, EOFError, MemoryError) as error:
        raise ValueError(f"{name} is not a NumPy array ({error})") from None
    if not isinstance(vector, np.ndarray):
        raise ValueError(f"{name} is not one NumPy array but several")
    if vector.shape != (num_classes,):
        raise ValueError(
            f"{name} has the shape {list(vector.shape)}, should be [{num_classes}]: one for each class name"
        )
    if not np.isin(vector, (0, 1)).all():
        raise ValueError(f"{name} should be 0 or 1 for each class, got {np.setdiff1d(vector, (0, 1))[0]}")
    return np.flatnonzero(vector)
