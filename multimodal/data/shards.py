"""Image-text pairs in tar shards, as WebDataset and img2dataset write them, read at random access."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from braceexpand import braceexpand
from pydantic import AfterValidator, BeforeValidator, Field, Strict

from multimodal.batch import Sample
from multimodal.data.files import locate, make_sample, read_captions
from multimodal.data.tars import Tars
from multimodal.data.texts import lines_of
from multimodal.files import from_json
from multimodal.parts import BadSample, Dataset, Source, did_you_mean

JSON, TEXT = "json", "txt"


def _expandable(url: str) -> str:
    list(braceexpand(url))
    return url


class Shards(Dataset):
    """Plain tar files of `key.jpg` (jpeg, png, webp) with captions in `key.json` or `key.txt`."""

    urls: Annotated[
        tuple[Annotated[str, AfterValidator(_expandable)], ...],
        Strict(False),
        BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
        Field(min_length=1),
    ]
    """Tar files: one or a list; braces expand ("train-{000..003}.tar")."""

    json_field: str | None = "captions"
    """Field of `key.json` with one caption or a list; null, or a key without it: `key.txt`, one caption a line."""

    def build(self, root: Path) -> "ShardSource":
        names = [name for url in self.urls for name in braceexpand(url)]
        return ShardSource(locate(root, *names), self.json_field)


class ShardSource(Source):
    """The samples of all shards, in their order."""

    def __init__(self, paths: Sequence[Path], json_field: str | None) -> None:
        self.tars, self.json_field = Tars(paths, (JSON, TEXT)), json_field
        images = np.bincount(self.tars.shards, minlength=len(paths))
        captioned = np.bincount(self.tars.shards, self.tars.has(JSON) | self.tars.has(TEXT), minlength=len(paths))
        for path, num_images, num_captioned in zip(paths, images, captioned, strict=True):
            if not num_captioned:
                raise ValueError(f"{path}: no captions (key.json, key.txt) beside its {num_images} images")
        self._check_json_field()

    def __len__(self) -> int:
        return len(self.tars)

    def __getitem__(self, index: int) -> Sample:
        return make_sample(self.key(index), self.tars.read(index), self._captions(index))

    def captions(self, index: int) -> tuple[str, ...]:
        try:
            return self._captions(index)
        except BadSample:
            return ()

    def key(self, index: int) -> str:
        return self.tars.name(index)

    def _captions(self, index: int) -> tuple[str, ...]:
        try:
            record = self._record(index)
            if self.json_field in record:
                return read_captions(record[self.json_field])
            return read_captions(lines_of(self.tars.read(index, TEXT).decode()))
        except ValueError as error:
            raise BadSample(f"{self.key(index)}: {error}") from None

    def _record(self, index: int) -> dict[str, Any]:
        """The fields of the key's JSON; none if it has no JSON, or if that is not to be read."""
        raw = self.tars.read(index, JSON) if self.json_field is not None else b""
        record = from_json(raw or b"{}", f"key.{JSON}")
        if not isinstance(record, dict):
            raise ValueError("the JSON is not a mapping")
        return record

    def _check_json_field(self) -> None:
        """Refuse a field that the first sample's JSON does not have, or warn where there is a `.txt` in its place."""
        try:
            record = self._record(0)
        except ValueError:  # one broken sample says nothing of the others
            return
        if record and self.json_field not in record:
            message = f"{self.key(0)}.json has no field '{self.json_field}', only {', '.join(record)}."
            message += did_you_mean(str(self.json_field), record)
            if not self.tars.read(0, TEXT):
                raise ValueError(message)
            warnings.warn(f"{message} Captions are read from .txt instead (json_field=null says so).", stacklevel=4)
