"""From gradients of logits, a tile at a time, to those of the features and of the scale."""

from collections.abc import Sequence

import torch
from torch import Tensor

from multimodal.losses.tiles import TILE, blocks, sums_dtype


class Gradients:
    """Gradients of two matrices of features, up to the factor that all logits have in common; only what is needed.

    The scale's is found from that of one matrix: the sum over its elements, times the features.
    """

    def __init__(
        self,
        x: Tensor,  # [n, D]
        y: Tensor,  # [m, D]
        needs: Sequence[bool],  # whether x, y and the scale need one
        precision: torch.dtype,  # of products
    ) -> None:
        needs_x, needs_y, self.needs_scale = needs
        through_x = needs_x or (self.needs_scale and not needs_y)
        self.x, self.y, self.precision = x, y, precision
        self.x_grad = torch.zeros_like(x, dtype=sums_dtype(precision)) if through_x else None
        self.y_grad = torch.zeros_like(y, dtype=sums_dtype(precision)) if needs_y else None
        self._x, self._y = x.to(precision), y.to(precision)

    def visited(self, y: Tensor, y_grad: Tensor | None) -> "Gradients":
        """The same x and its gradient, with another rank's y and what it collects."""
        gradients = Gradients(self.x, y, (False, False, False), self.precision)
        gradients.x_grad, gradients.y_grad = self.x_grad, y_grad
        return gradients

    def add_partners(
        self,
        weights: Tensor,  # [n] gradients of the logits of x[i] and y[first + i]
        first: int,
    ) -> None:
        """Take in the pairs that match."""
        partner = slice(first, first + len(self.x))
        if self.x_grad is not None:
            self.x_grad.addcmul_(self.y[partner], weights[:, None])
        if self.y_grad is not None:
            self.y_grad[partner].addcmul_(self.x, weights[:, None])

    def add(
        self,
        weights: Tensor,  # [rows, columns] gradients of a tile's logits
        rows: slice,
        columns: slice,
    ) -> None:
        """Take in a tile."""
        weights = weights.to(self.precision)
        if self.x_grad is not None:
            _add_product(self.x_grad[rows], weights, self._y[columns])
        if self.y_grad is not None:
            _add_product(self.y_grad[columns], weights.T, self._x[rows])

    def result(
        self,
        scale: Tensor,  # [], and
        unit: Tensor,  # [] make up the common factor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of x, y and the scale; x's also where only the scale's was needed."""
        scale_grad = None
        if self.needs_scale:
            pairs = [(self.x_grad, self.x), (self.y_grad, self.y)]
            scale_grad = unit * next(_inner(grad, z) for grad, z in pairs if grad is not None)
        x_grad, y_grad = (None if grad is None else grad.mul_(scale * unit) for grad in (self.x_grad, self.y_grad))
        return x_grad, y_grad, scale_grad


def like(dtype: torch.dtype, grad: Tensor | None) -> Tensor | None:
    """The gradient in the dtype of what it is the gradient of."""
    return None if grad is None else grad.to(dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """The sum of products of all elements, without another matrix of their size."""
    return torch.stack([(a[rows] * b[rows]).sum() for rows in blocks(len(a), TILE)]).sum()
