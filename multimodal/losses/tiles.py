"""Logits of all pairs, a tile at a time."""

import math
from collections.abc import Iterator, Sequence
from itertools import count

import torch
from torch import Tensor

TILE = 1024
"""Rows and columns of a tile: large enough for products at full speed, small enough to stay in a processor's cache."""
LOG2_E = math.log2(math.e)
"""Powers are taken of 2: exp2 is several times as fast as exp on a CPU, and a hundred times where exp underflows."""


class Tiles:
    """Iterates over the logits `scale * x @ y.T` as (rows, columns, logits of those rows and columns).

    What is yielded is overwritten by the next tile. Pairs that do not count are -inf in it: x[i] with y[first + i], its
    partner, and, where ids are given, all pairs of equal ids. Operands of products are rounded to `precision`, and on
    the way out of a product in bf16 or fp16 so is the result; all else is in at least float32.
    """

    def __init__(
        self,
        x: Tensor,  # [n, D]
        y: Tensor,  # [m, D]
        scale: Tensor,  # [], in the dtype of sums
        precision: torch.dtype,
        tile: int,
        first: int | None,  # None: no row has its partner among the columns
        excluded: tuple[Tensor, Tensor] | None = None,  # ids [n] and [m]
        kept: Tensor | None = None,  # one row a tile, of `kept_shape`, in `precision`: where products are kept
        filled: bool = False,  # whether they are in there already
    ) -> None:
        self.x, self.y, self.scale = x.to(precision), y, scale
        self.precision, self.tile, self.first, self.excluded = precision, tile, first, excluded
        self.kept, self.filled = kept, filled
        self._tile = self.scratch()
        self._products = self._tile if precision == self._tile.dtype else self.scratch(precision)

    @staticmethod
    def kept_shape(n: int, m: int, tile: int) -> tuple[int, int]:
        """Of the memory that keeps the products of all tiles."""
        return len(list(blocks(n, tile))) * len(list(blocks(m, tile))), min(tile, n) * min(tile, m)

    def scratch(self, dtype: torch.dtype | None = None) -> Tensor:
        """Memory for a tile, to be cut to one by `fit`."""
        elements = min(self.tile, len(self.x)) * min(self.tile, len(self.y))
        return torch.empty(elements, dtype=dtype or self.scale.dtype, device=self.x.device)

    def __iter__(self) -> Iterator[tuple[slice, slice, Tensor]]:
        numbers = count()
        for columns in blocks(len(self.y), self.tile):
            scaled = None if self.filled else self._scaled(columns)
            for rows in blocks(len(self.x), self.tile):
                yield rows, columns, self._logits(scaled, rows, columns, next(numbers))

    def _scaled(self, columns: slice) -> Tensor:
        """Columns of the right operand, laid out the other way round: products are faster so."""
        return (self.y[columns].to(self.scale.dtype) * self.scale).to(self.precision).T.contiguous()

    def _logits(self, scaled: Tensor | None, rows: slice, columns: slice, number: int) -> Tensor:
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        products = fit(self._products if self.kept is None else self.kept[number], shape)
        if scaled is not None:
            torch.mm(self.x[rows], scaled, out=products)
        elif products.dtype == self._tile.dtype:
            return products  # as they were yielded when they were filled in
        logits = products if products.dtype == self._tile.dtype else fit(self._tile, shape).copy_(products)
        if self.excluded is not None:
            x_ids, y_ids = self.excluded
            logits.masked_fill_(x_ids[rows, None] == y_ids[columns], -torch.inf)
        if self.first is not None:
            partners(logits, rows, columns, self.first).fill_(-torch.inf)
        return logits


def blocks(length: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that make up `length`."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def fit(memory: Tensor, shape: Sequence[int]) -> Tensor:
    """The first part of some memory, in a shape of two dimensions."""
    return memory[: shape[0] * shape[1]].view(shape[0], shape[1])


def partners(tile: Tensor, rows: slice, columns: slice, first: int) -> Tensor:
    """The entries of a tile at (i, first + i), as a view; empty if it has none."""
    offset = first + rows.start - columns.start
    return tile.diagonal(offset) if -tile.shape[0] < offset < tile.shape[1] else tile[:0, 0]


def product_dtype(
    x: Tensor,
    y: Tensor,
) -> torch.dtype:
    """What products of features are in: their own dtype, or that of autocast, if it is on here.

    float64 stays. A CPU has no fast product in fp16: there the rounded operands are multiplied in float32.
    """
    device, dtype = x.device.type, torch.promote_types(x.dtype, y.dtype)
    if dtype == torch.float32 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return torch.float32 if dtype == torch.float16 and device == "cpu" else dtype


def sums_dtype(precision: torch.dtype) -> torch.dtype:
    """What is added up in: float64 for float64, else float32."""
    return torch.float64 if precision == torch.float64 else torch.float32
