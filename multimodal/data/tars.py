"""Tar files at random access: an index from the headers alone, and bytes through memory maps."""

import mmap
import re
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from multimodal.data.archives import BROKEN, regular
from multimodal.data.files import IMAGE_SUFFIXES, PackedStrings

MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")
"""A member's name: the key is the path up to the first dot of the file name, what follows says what it holds."""

IMAGE = "image"
ABSENT = (0, 0)  # where a member that a key does not have starts and stops
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}
BLOCK = 512  # bytes; a tar ends with blocks of zeros
MAX_MAPS = 256  # maps kept open in a process; each holds a file descriptor


class Tars:
    """The keys of plain tar files that have an image, in their order; a file is mapped where it is first read."""

    def __init__(self, paths: Sequence[Path], suffixes: Sequence[str]) -> None:
        """`suffixes` are those of the members that may be beside an image: "json", "txt"."""
        bar = tqdm(paths, desc="Indexing shards", unit="shard", delay=2, disable=None)
        keys, spans = zip(*(_index(path, suffixes) for path in bar), strict=True)
        self.paths = paths
        self.keys = PackedStrings(key for shard in keys for key in shard)
        self.shards = np.repeat(np.arange(len(paths), dtype=np.int32), [len(shard) for shard in keys])  # [N]
        self.places = {suffix: place for place, suffix in enumerate((IMAGE, *suffixes))}
        self.spans = np.concatenate(spans)  # int64 [N, members, (start, stop)]
        self.maps: dict[int, mmap.mmap] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "maps": {}}

    def __len__(self) -> int:
        return len(self.keys)

    def name(self, index: int) -> str:
        """The key and the file that it is in: "000.tar/0012"."""
        key = self.keys[index]
        return f"{self.paths[self.shards[index]].name}/{key}"

    def has(self, suffix: str) -> NDArray[np.bool_]:  # [N]
        """Which keys have such a member, with something in it."""
        spans = self.spans[:, self.places[suffix]]
        return np.asarray(spans[:, 0] < spans[:, 1])

    def read(self, index: int, suffix: str = IMAGE) -> bytes:
        """The member's bytes; none if the key has no such member."""
        shard = int(self.shards[index])
        if shard not in self.maps:
            if len(self.maps) == MAX_MAPS:
                self.maps.pop(next(iter(self.maps)))
            with self.paths[shard].open("rb") as file:
                self.maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start, stop = self.spans[index, self.places[suffix]]
        return self.maps[shard][start:stop]


def _index(path: Path, suffixes: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """The keys that have an image, and where it and its other members start and stop."""
    found: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in regular(tar):
                if match := MEMBER.fullmatch(member.name.removeprefix("./")):
                    span = (member.offset_data, member.offset_data + member.size)
                    found.setdefault(match[1], {})[match[2].lower()] = span
            file.seek(tar.offset)
            if file.read(BLOCK) != bytes(BLOCK):  # tarfile takes a broken header for the end
                raise tarfile.ReadError(f"no end-of-archive mark where the members stop, at byte {tar.offset}")
    except BROKEN as error:
        raise ValueError(f"{path}: {_why_unreadable(path, error)}") from None
    rows = {key: _row(members, suffixes) for key, members in found.items()}
    rows = {key: row for key, row in rows.items() if row[0] != ABSENT}
    if not rows:
        raise ValueError(f"{path}: no image (key.{', key.'.join(IMAGE_SUFFIXES)}) among its {len(found)} keys")
    return list(rows), np.array(list(rows.values()))


def _row(members: Mapping[str, tuple[int, int]], suffixes: Sequence[str]) -> list[tuple[int, int]]:
    image = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), ABSENT)
    return [image, *(members.get(suffix, ABSENT) for suffix in suffixes)]


def _why_unreadable(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        magic = file.read(2)
    if magic in COMPRESSED:
        return f"compressed with {COMPRESSED[magic]}; only plain tar files can be read at random, so unpack it first"
    return f"not a whole tar file ({error})"
