"""The model as evaluations and users see it: raw inputs in, unit-norm features out."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from multimodal import distributed
from multimodal.data.loader import Reader, quiet_worker
from multimodal.model import Model


class _Inputs(Dataset[Tensor]):
    def __init__(self, inputs: Sequence[Any], reader: Reader) -> None:
        self.inputs, self.reader = inputs, reader

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Tensor:
        return self.reader.preprocessor(self.inputs[index], None)


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

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)

    @torch.no_grad()
    def encode(self, tower: str, inputs: Sequence[Any]) -> Tensor:
        """Raw inputs (PIL images, strings), indexed lazily, to unit-norm float32 [n, D] on the CPU of every rank."""
        bounds = [len(inputs) * r // distributed.world_size() for r in range(distributed.world_size() + 1)]
        mine = range(bounds[distributed.rank()], bounds[distributed.rank() + 1])
        loader: DataLoader[Tensor] = DataLoader(
            Subset(_Inputs(inputs, self.readers[tower]), mine),
            batch_size=self.batch_size,
            num_workers=self.workers if self.readers[tower].reads == "image" else 0,
            worker_init_fn=quiet_worker,
            generator=torch.Generator(),
        )
        device = self.model.logit_scale.device
        parts = [torch.empty(0, self.model.embed_dim)]
        hide = True if distributed.rank() else None  # None hides it where there is no terminal
        with (
            self._evaluating(),
            tqdm(total=len(mine), desc=f"embedding {tower}", unit="", leave=False, disable=hide) as bar,
        ):
            batches = iter(loader)
            try:
                for batch in batches:
                    with self.context:
                        parts.append(self.model.encode(tower, batch.to(device)).float().cpu())
                    bar.update(len(batch))
            finally:  # workers do not heed signals, and an exception would keep them alive
                getattr(batches, "_shutdown_workers", lambda: None)()
        return distributed.gather_uneven(torch.cat(parts), [b - a for a, b in pairwise(bounds)])
