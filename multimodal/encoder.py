"""The model as evaluations and users see it: raw inputs in, unit-norm features out."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from multimodal import distributed
from multimodal.data.loader import Reader, ReadInputs, read_inputs
from multimodal.model import Model
from multimodal.parts import BadSample
from multimodal.sharding import gathered

SORTED = 64
"""Batches of texts that are read before they are embedded, those of like length together."""


class Encoder:
    """Embeds with a model in evaluation mode, each rank its share, batch by batch."""

    def __init__(
        self,
        model: Model,
        readers: Mapping[str, Reader],
        context: torch.autocast,
        batch_size: int = 256,
        workers: int = 0,
    ) -> None:
        self.model, self.readers, self.context = model, readers, context
        self.batch_size, self.workers = batch_size, workers

    @property
    def logit_scale(self) -> float:
        """The multiplier of cosines."""
        return distributed.whole(self.model.logit_scale.detach()).exp().item()

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)

    def encode(self, tower: str, inputs: Sequence[Any]) -> Tensor:
        """Raw inputs (PIL images, strings), indexed lazily, to unit-norm float32 [n, D] on the CPU of every rank."""
        return self._encode(tower, inputs, None)

    def encode_readable(self, tower: str, inputs: Sequence[Any]) -> tuple[Tensor, dict[int, str]]:
        """The same, but rows of broken inputs and missing files are NaN; and what is wrong with this rank's ones."""
        broken: dict[int, str] = {}
        return self._encode(tower, inputs, broken), broken

    @torch.no_grad()
    def _encode(self, tower: str, inputs: Sequence[Any], broken: dict[int, str] | None) -> Tensor:
        bounds = [len(inputs) * r // distributed.world_size() for r in range(distributed.world_size() + 1)]
        mine = range(bounds[distributed.rank()], bounds[distributed.rank() + 1])
        features = torch.full((len(mine), self.model.embed_dim), torch.nan, dtype=torch.float32)
        device = self.model.logit_scale.device
        hide = True if distributed.rank() else None  # None hides it where there is no terminal
        reader = self.readers[tower]
        size = self.batch_size * SORTED if reader.reads == "text" else self.batch_size
        with (
            self._evaluating(),
            gathered(self.model.towers[tower]),
            tqdm(total=len(mine), desc=f"embedding {tower}", unit="", leave=False, delay=1, disable=hide) as bar,
            closing(read_inputs(inputs, reader, mine, size, self.workers)) as read,
        ):
            for some in read:
                for place, error in some.broken.items():
                    if broken is None or not isinstance(error, BadSample | FileNotFoundError):
                        raise error
                    broken[place] = str(error)
                bar.update(len(some.broken))
                for rows, lengths in self._batches(tower, some):
                    with self.context:
                        made = self.model.encode(tower, some.values[rows].to(device), lengths)
                    features[torch.tensor(some.places)[rows] - mine.start] = made.float().cpu()
                    bar.update(len(rows))
        return distributed.gather_uneven(features, [b - a for a, b in pairwise(bounds)])

    def _batches(self, tower: str, read: ReadInputs) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Rows of what was read that are embedded at a time, and their lengths, if any: the shortest first."""
        if not read.places:
            return
        lengths = self.model.lengths({tower: read.values}).get(tower)
        order = torch.arange(len(read.places)) if lengths is None else lengths.argsort(stable=True)
        for rows in torch.split(order, self.batch_size):
            yield rows, None if lengths is None else lengths[rows]
