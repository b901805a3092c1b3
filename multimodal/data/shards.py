"""Image-text pairs in tar shards, as WebDataset and img2dataset write them, read at random access."""

import json
import mmap
import re
import tarfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from braceexpand import braceexpand
from numpy.typing import NDArray
from pydantic import AfterValidator, BeforeValidator, Field, Strict
from tqdm import tqdm

from multimodal.batch import Sample
from multimodal.data.files import IMAGE_SUFFIXES, PackedStrings, locate, make_sample, read_captions
from multimodal.parts import BadSample, Dataset, Source, did_you_mean

MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")
"""A member's name: the key is the path up to the first dot of the file name, what follows says what it holds."""

IMAGE, JSON, TEXT = range(3)
ABSENT = (0, 0)  # where a member that a key does not have starts and stops
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}
BLOCK = 512  # bytes; a tar ends with blocks of zeros
MAX_MAPS = 256  # maps kept open in a process; each holds a file descriptor


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
    """The samples of all shards, in their order; bytes come through memory maps, opened where they are first used."""

    def __init__(self, paths: Sequence[Path], json_field: str | None) -> None:
        bar = tqdm(paths, desc="Indexing shards", unit="shard", delay=2, disable=None)
        keys, spans = zip(*(_index(path) for path in bar), strict=True)
        self.paths, self.json_field = paths, json_field
        self.keys = PackedStrings(key for shard in keys for key in shard)
        self.shards = np.repeat(np.arange(len(paths), dtype=np.int32), [len(shard) for shard in keys])  # [N]
        self.spans = np.concatenate(spans)  # int64 [N, 3, (start, stop)]
        self.maps: dict[int, mmap.mmap] = {}
        self._check_json_field()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "maps": {}}

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Sample:
        return make_sample(self.key(index), self._read(index, IMAGE), self._captions(index))

    def captions(self, index: int) -> tuple[str, ...]:
        try:
            return self._captions(index)
        except BadSample:
            return ()

    def key(self, index: int) -> str:
        key = self.keys[index]
        return f"{self.paths[self.shards[index]].name}/{key}"

    def _read(self, index: int, member: int) -> bytes:
        """The member's bytes; none if the key has no such member."""
        shard = int(self.shards[index])
        if shard not in self.maps:
            if len(self.maps) == MAX_MAPS:
                self.maps.pop(next(iter(self.maps)))
            with self.paths[shard].open("rb") as file:
                self.maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start, stop = self.spans[index, member]
        return self.maps[shard][start:stop]

    def _captions(self, index: int) -> tuple[str, ...]:
        try:
            record = self._record(index)
            if self.json_field in record:
                return read_captions(record[self.json_field])
            return read_captions(self._read(index, TEXT).decode().split("\n"))
        except ValueError as error:
            raise BadSample(f"{self.key(index)}: {error}") from None

    def _record(self, index: int) -> dict[str, Any]:
        """The fields of the key's JSON; none if it has no JSON, or if that is not to be read."""
        raw = self._read(index, JSON) if self.json_field is not None else b""
        record = json.loads(raw or b"{}")
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
            if not self._read(0, TEXT):
                raise ValueError(message)
            warnings.warn(f"{message} Captions are read from .txt instead (json_field=null says so).", stacklevel=4)


def _index(path: Path) -> tuple[list[str], NDArray[np.int64]]:
    """The keys that have an image, and where its image, JSON and text start and stop, from the headers alone."""
    found: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isreg() and (match := MEMBER.fullmatch(member.name.removeprefix("./"))):
                    span = (member.offset_data, member.offset_data + member.size)
                    found.setdefault(match[1], {})[match[2].lower()] = span
            file.seek(tar.offset)
            if file.read(BLOCK) != bytes(BLOCK):  # tarfile takes a broken header for the end
                raise tarfile.ReadError(f"no end-of-archive mark where the members stop, at byte {tar.offset}")
    except tarfile.ReadError as error:
        raise ValueError(f"{path}: {_why_unreadable(path, error)}") from None
    images = {key: next((spans[s] for s in IMAGE_SUFFIXES if s in spans), ABSENT) for key, spans in found.items()}
    keys = [key for key, span in images.items() if span != ABSENT]
    if not keys:
        raise ValueError(f"{path}: no image (key.{', key.'.join(IMAGE_SUFFIXES)}) among its {len(found)} keys")
    spans = np.array([(images[key], found[key].get("json", ABSENT), found[key].get("txt", ABSENT)) for key in keys])
    if not spans[:, (JSON, TEXT)].any():
        raise ValueError(f"{path}: no captions (key.json, key.txt) beside its {len(keys)} images")
    return keys, spans


def _why_unreadable(path: Path, error: tarfile.ReadError) -> str:
    with path.open("rb") as file:
        magic = file.read(2)
    if magic in COMPRESSED:
        return f"compressed with {COMPRESSED[magic]}; only plain tar files can be read at random, so unpack it first"
    return f"not a whole tar file ({error})"
