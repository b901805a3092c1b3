"""The order of training samples: a pure function of (seed, epoch), whatever the number of workers and ranks."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

Position = tuple[int, int]
"""(epoch, index): which sample, and which of its random variations."""


def epoch_order(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """All indices, shuffled."""
    return np.random.default_rng((seed, epoch)).permutation(num_samples)


class Batches(Sampler[list[Position]]):
    """This rank's rows of the global batches from step `start` to `stop`.

    Batches do not cross epochs (a sample would meet itself as a negative): what does not fill the last one is left out,
    other samples each epoch.
    """

    def __init__(
        self, num_samples: int, seed: int, global_batch_size: int, rank: int, world_size: int, start: int, stop: int
    ) -> None:
        self.num_samples, self.seed = num_samples, seed
        self.global_batch_size = global_batch_size
        rows = global_batch_size // world_size
        self.rows = slice(rank * rows, (rank + 1) * rows)
        self.start, self.stop = start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[Position]]:
        per_epoch = self.num_samples // self.global_batch_size
        order, order_epoch = np.empty(0, np.int64), -1
        for step in range(self.start, self.stop):
            epoch, place = divmod(step, per_epoch)
            if epoch != order_epoch:
                order, order_epoch = epoch_order(self.num_samples, self.seed, epoch), epoch
            batch = order[place * self.global_batch_size : (place + 1) * self.global_batch_size]
            yield [(epoch, int(index)) for index in batch[self.rows]]
