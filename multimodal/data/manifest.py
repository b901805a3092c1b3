"""Image-text pairs from a table of image paths and captions, as CSV or JSON lines."""

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator

from multimodal.batch import Sample
from multimodal.data.files import PackedStrings, check_images, locate, make_sample, read_captions
from multimodal.files import from_json
from multimodal.parts import Dataset, Source, did_you_mean

CSV, JSON_LINES = (".csv", ".tsv", ".txt"), (".jsonl", ".ndjson")


def _known_ending(path: str) -> str:
    if not path.lower().endswith(CSV + JSON_LINES):
        raise ValueError(f"should end in one of {', '.join(CSV + JSON_LINES)}, got '{path}'")
    return path


class Manifest(Dataset):
    """A table with a row for each pair; rows with the same image make one sample with several captions.

    CSV has a header, and comma, tab, semicolon or pipe between its columns; in JSON lines a caption may also be a list.
    """

    path: Annotated[str, AfterValidator(_known_ending)]
    """The table: .csv, .tsv or .txt; .jsonl or .ndjson."""

    image_column: str = "image"
    """Column, or JSON field, of the image's path."""

    caption_column: str = "caption"
    """Column, or JSON field, of the caption."""

    images: str | None = None
    """Folder that the image paths are relative to; null for the folder of the table."""

    def build(self, root: Path) -> "ManifestSource":
        (path,) = locate(root, self.path)
        folder = path.parent if self.images is None else root / self.images
        samples: dict[str, tuple[int, list[str]]] = {}
        for line, row in _rows(path):
            image, caption = (_cell(row, column, path, line) for column in (self.image_column, self.caption_column))
            try:
                samples.setdefault(str(image), (line, []))[1].extend(read_captions(caption))
            except ValueError as error:
                raise ValueError(f"{path}, line {line}: {error}") from None
        if not samples:
            raise ValueError(f"{path}: no rows")
        check_images(path, folder, {image: f"line {line}" for image, (line, _) in samples.items()})
        return ManifestSource(path.name, folder, {image: captions for image, (_, captions) in samples.items()})


class ManifestSource(Source):
    """Images in the order in which the table first names them."""

    def __init__(self, name: str, folder: Path, samples: Mapping[str, list[str]]) -> None:
        self.name, self.folder = name, folder
        self.images = PackedStrings(samples)
        self.texts = PackedStrings(caption for captions in samples.values() for caption in captions)
        self.ends = np.cumsum([0, *map(len, samples.values())])  # int64 [N + 1] into texts

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        return make_sample(self.key(index), self.folder / self.images[index], self.captions(index))

    def key(self, index: int) -> str:
        return f"{self.name}/{self.images[index]}"

    def captions(self, index: int) -> tuple[str, ...]:
        return tuple(self.texts[i] for i in range(self.ends[index], self.ends[index + 1]))


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The rows of the table by column, with their line numbers, from 1."""
    with path.open(encoding="utf-8-sig", newline="") as lines:
        try:
            yield from _json_rows(path, lines) if path.name.lower().endswith(JSON_LINES) else _csv_rows(path, lines)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 ({error})") from None


def _json_rows(path: Path, lines: Iterator[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = from_json(line, f"{path}, line {number}")
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: should be a mapping with the fields, got {line.strip():.80}")
        yield number, row


def _csv_rows(path: Path, lines: Iterator[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    # The header alone tells the separator: captions are full of commas, which mislead csv.Sniffer.
    first = next(lines, "")
    headers = {separator: next(csv.reader([first], delimiter=separator), []) for separator in ",\t;|"}
    separator = max(headers, key=lambda separator: len(headers[separator]))
    header = [column.strip() for column in headers[separator]]
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=True, strict=True)
    line = 2  # where the row begins, which may span lines
    try:
        for row in reader:
            if row and len(row) != len(header):
                raise csv.Error(
                    f"{len(row)} cells under a header of {len(header)}; captions with a separator need quotes"
                )
            if row:
                yield line, dict(zip(header, row, strict=True))
            line = reader.line_num + 2
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}: {error}") from None


def _cell(row: Mapping[str, Any], column: str, path: Path, line: int) -> Any:
    if column not in row:
        raise ValueError(
            f"{path}, line {line}: no column '{column}', only {', '.join(row)}.{did_you_mean(column, row)}"
        )
    return row[column]
