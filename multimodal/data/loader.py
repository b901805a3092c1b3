"""From a source to batches: draw, augment, tokenise in worker processes; stand in for broken samples."""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from random import Random
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from multimodal.batch import Batch
from multimodal.data.order import Batches, Position
from multimodal.data.workers import read
from multimodal.parts import BadSample, Preprocessor, Source

MAX_ATTEMPTS = 100

Kept = Callable[[int], Tensor]
"""The features [W] of a sample that a frozen tower made before; BadSample where it could not."""


@dataclass(frozen=True)
class Reader:
    """How one tower reads a sample."""

    reads: str
    """The sample's input, "image" or "text"."""
    preprocessor: Preprocessor


@dataclass(frozen=True)
class _Row:
    inputs: dict[str, Tensor]
    pooled: dict[str, Tensor]
    index: int
    ids: dict[str, int]
    replaced: tuple[str, ...]
    truncated: int


class _Rows(Dataset[_Row]):
    """The training sample at a position, or, where that is broken, one drawn from (seed, epoch, index)."""

    def __init__(self, source: Source, readers: Mapping[str, Reader], seed: int, kept: Mapping[str, Kept]) -> None:
        self.source, self.seed, self.kept = source, seed, dict(kept)
        self.readers = {name: reader for name, reader in readers.items() if name not in kept}
        self.only_captions = all(reader.reads == "text" for reader in self.readers.values())

    def __getitem__(self, position: Position) -> _Row:
        epoch, index = position
        rng = Random(f"{self.seed}/{epoch}/{index}")
        replaced: list[str] = []
        before = self._truncated()
        while len(replaced) < MAX_ATTEMPTS:
            try:
                pooled = {name: kept(index) for name, kept in self.kept.items()}
                read = {"text": self.source.captions(index)} if self.only_captions else self.source[index].inputs
                inputs = {name: reader.preprocessor(read[reader.reads], rng) for name, reader in self.readers.items()}
                ids = self._ids(index, inputs)
                return _Row(inputs, pooled, index, ids, tuple(replaced), self._truncated() - before)
            except BadSample as error:
                replaced.append(str(error))
                index = rng.randrange(len(self.source))
        raise BadSample(f"{MAX_ATTEMPTS} samples in a row are broken, the last one {replaced[-1]}")

    def _ids(self, index: int, inputs: Mapping[str, Tensor]) -> dict[str, int]:
        """What a row has in common with others, as numbers: the caption that was drawn, and the class."""
        tokens = [inputs[name] for name, reader in self.readers.items() if reader.reads == "text"]
        captions = [caption.encode() for caption in self.source.captions(index)[:1]] if not tokens else []
        told = [text.numpy().tobytes() for text in tokens] or captions or [str(index).encode()]
        digest = blake2b(b"".join(told), digest_size=8).digest()
        label = self.source.label(index)
        found = {"caption": int.from_bytes(digest, "big", signed=True)}
        return found if label is None else {**found, "label": label}

    def _truncated(self) -> int:
        return sum(reader.preprocessor.num_truncated for reader in self.readers.values())


def _collate(rows: list[_Row]) -> Batch:
    inputs = {name: torch.stack([row.inputs[name] for row in rows]) for name in rows[0].inputs}
    pooled = {name: torch.stack([row.pooled[name] for row in rows]) for name in rows[0].pooled}
    replaced = [line for row in rows for line in row.replaced]
    for row in rows:
        if row.ids.keys() != rows[0].ids.keys():
            known = [f"sample {one.index} has {' and '.join(one.ids)}" for one in (rows[0], row)]
            raise BadSample(f"all samples should have a class, or none: {', '.join(known)}")
    ids = {kind: torch.tensor([row.ids[kind] for row in rows]) for kind in rows[0].ids}
    indices, truncated = torch.tensor([row.index for row in rows]), sum(row.truncated for row in rows)
    return Batch(inputs, indices, ids, replaced, truncated, pooled)


# --- training -------------------------------------------------------------------------------------------------------


def training_batches(
    source: Source,
    readers: Mapping[str, Reader],
    order: Batches,
    seed: int,
    workers: int,
    kept: Mapping[str, Kept] = MappingProxyType({}),
    timeout: float = 0,  # seconds that a batch may take to come from the workers; 0 for any
    pinned: bool = False,  # in memory that a GPU fetches by itself; this process then holds memory of the GPU
) -> Generator[Batch, None, None]:
    """The batches of `order`; the same ones whatever the number of workers. Of `kept` towers no inputs are read.

    To be closed, so that its workers end.
    """
    rows = _Rows(source, readers, seed, kept)
    return read(rows, workers, timeout, batch_sampler=order, collate_fn=_collate, pin_memory=pinned)


# --- everything once, in order --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReadInputs:
    """Some inputs in a row, as one tower reads them."""

    values: Tensor
    """[n, ...] of those that could be read."""
    places: list[int]
    """Theirs among all inputs."""
    broken: dict[int, Exception]
    """What is wrong with the others, by place."""


class _Inputs(Dataset[tuple[int, Tensor | Exception]]):
    def __init__(self, inputs: Sequence[Any], reader: Reader, places: range) -> None:
        self.inputs, self.reader, self.places = inputs, reader, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[int, Tensor | Exception]:
        place = self.places[index]
        try:
            return place, self.reader.preprocessor(self.inputs[place], None)
        except (ValueError, OSError) as error:  # as a value: raised in a worker, it would arrive as a traceback in text
            return place, error


def _stack(rows: list[tuple[int, Tensor | Exception]]) -> ReadInputs:
    values = {place: value for place, value in rows if isinstance(value, Tensor)}
    broken = {place: value for place, value in rows if not isinstance(value, Tensor)}
    return ReadInputs(torch.stack(list(values.values())) if values else torch.empty(0), list(values), broken)


def read_inputs(
    inputs: Sequence[Any],
    reader: Reader,
    places: range,  # which of the inputs
    batch_size: int,
    workers: int,
) -> Generator[ReadInputs, None, None]:
    """Inputs as a tower reads them in evaluation, batch by batch. To be closed, so that its workers end."""
    workers = workers if reader.reads == "image" else 0
    return read(_Inputs(inputs, reader, places), workers, batch_size=batch_size, collate_fn=_stack)
