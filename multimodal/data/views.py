"""Samples seen from one side: one of their inputs, their captions row by row, a part of them; read when indexed."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from multimodal.parts import BadSample, Source

T = TypeVar("T")


class Slice(Sequence[T]):
    """Some places of a sequence."""

    def __init__(self, items: Sequence[T], places: Sequence[int]) -> None:
        self.items, self.places = items, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        return self.items[self.places[index]]


class Mapped(Sequence[T]):
    """What a function makes of every place."""

    def __init__(self, function: Callable[[int], T], places: range) -> None:
        self.function, self.places = function, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        return self.function(self.places[index])


class Inputs(Sequence[Any]):
    """One input of every sample, "image" or "text" (all captions), or of some; BadSample if broken."""

    def __init__(self, source: Source, reads: str, some: int | Sequence[int] | None = None) -> None:
        """`some` are the first so many samples, or those at these places, in rising order."""
        self.source, self.reads = source, reads
        self.places = range(len(source))[:some] if some is None or isinstance(some, int) else some

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        return self.source[self.places[index]].inputs[self.reads]


class Captions(Sequence[str]):
    """Every caption of every sample, in their order; a sample without one has one row, which is a BadSample."""

    def __init__(self, source: Source) -> None:
        self.source = source
        counts, digest = np.ones(len(source), dtype=np.int64), hashlib.sha256()
        for index in tqdm(range(len(source)), desc="Reading captions", unit="", delay=2, disable=None):
            captions = source.captions(index)
            counts[index] = max(1, len(captions))
            digest.update(repr(captions).encode())
        self.starts = np.concatenate([[0], counts.cumsum()])  # int64 [N + 1] of samples, in rows
        self.digest = digest.hexdigest()
        """Of all captions."""

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: Any) -> Any:
        sample, number = self._place(index)
        captions = self.source.captions(sample)
        if not captions:
            raise BadSample(f"{self.source.key(sample)}: no caption, or only empty ones")
        return captions[number]

    def key(self, row: int) -> str:
        """The sample's key, and which of its captions this is: "shard.tar/000123#0"."""
        sample, number = self._place(row)
        return f"{self.source.key(sample)}#{number}"

    def _place(self, row: int) -> tuple[int, int]:
        row = range(len(self))[row]
        sample = int(np.searchsorted(self.starts, row, side="right")) - 1
        return sample, row - int(self.starts[sample])
