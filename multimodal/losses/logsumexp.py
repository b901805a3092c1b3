"""For every row and every column of the logits, how strong its negatives are: their log-sum-exp, without the matrix."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from multimodal.losses.gradients import Gradients, like
from multimodal.losses.tiles import LOG2_E, Tiles, fit

HEADROOM = 80
"""A tile's powers are at most 2 to this, which leaves as much room below as above; sums of them are finite."""
SPAN = 120
"""If log-sum-exps of a tile are within this, so are the factors in its gradient, and what matters of its powers."""


def negatives(
    x: Tensor,  # [n, D]
    y: Tensor,  # [m, D]
    scale: Tensor,  # [] in the dtype of sums
    precision: torch.dtype,  # of products
    tile: int,
    keep: bool,
    first: int,  # the partner of x[i] is y[first + i]
    excluded: tuple[Tensor, Tensor] | None,  # ids [n] and [m]: pairs of equal ids do not count
) -> tuple[Tensor, Tensor, Tensor]:  # [n], [n], [m]
    """Logits of the partners, and the log-sum-exp over the other logits of each row and of each column.

    -inf where there are no others. A logit of another pair is computed once for its row and its column; the backward
    computes it again, or with `keep` reads it from the [n, m] matrix that is then kept. What is saved is else O(n + m).
    """
    found: tuple[Tensor, Tensor, Tensor] = _Negatives.apply(x, y, scale, precision, tile, keep, first, excluded)
    return found


class _Negatives(torch.autograd.Function):
    """Logits are in units of log 2 here.

    A logit has one power for its row and its column, relative to what the tile has in common. Where the range of the
    numbers is too small for that, and where a look at them would have to wait for the device, it has two.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        precision: torch.dtype,
        tile: int,
        keep: bool,
        first: int,
        excluded: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kept = None
        if keep:
            kept = torch.empty(Tiles.kept_shape(len(x), len(y), tile), dtype=precision, device=x.device)
        rows, columns = _Running(len(x), scale), _Running(len(y), scale)
        tiles = Tiles(x, y, scale * LOG2_E, precision, tile, first, excluded, kept)
        memory = tiles.scratch()
        for i, j, logits in tiles:
            if not _add_together(rows, columns, i, j, logits, memory):
                rows.add_apart(i, logits, 1, memory)
                columns.add_apart(j, logits, 0, memory)
        row_lse, column_lse = rows.result(), columns.result()
        ctx.settings = (precision, tile, first)
        ctx.save_for_backward(x, y, scale, row_lse, column_lse, kept, *(excluded or ()))
        partner_logits = torch.linalg.vecdot(x.to(scale.dtype), y[first : first + len(x)].to(scale.dtype)) * scale
        return partner_logits, row_lse / LOG2_E, column_lse / LOG2_E

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, partner_grad: Tensor, row_grad: Tensor, column_grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, scale, row_lse, column_lse, kept, *ids = ctx.saved_tensors
        precision, tile, first = ctx.settings
        # Of the order of 1 / B: as they are, products in fp16 would lose them.
        unit = torch.stack([grad.abs().amax() for grad in (partner_grad, row_grad, column_grad)]).amax()
        unit = unit.clamp_min(torch.finfo(scale.dtype).tiny)
        partner_grad, row_grad, column_grad = (grad / unit for grad in (partner_grad, row_grad, column_grad))
        row_lse, column_lse = (lse.masked_fill(lse == -torch.inf, 0) for lse in (row_lse, column_lse))

        gradients = Gradients(x, y, ctx.needs_input_grad[:3], precision)
        gradients.add_partners(partner_grad, first)
        excluded = (ids[0], ids[1]) if ids else None
        tiles = Tiles(x, y, scale * LOG2_E, precision, tile, first, excluded, kept, filled=kept is not None)
        memory = tiles.scratch(), tiles.scratch()
        for i, j, logits in tiles:
            given = (logits, row_lse[i], column_lse[j], row_grad[i], column_grad[j], memory)
            weights = _weights_together(*given)
            if weights is None:
                weights = _weights_apart(*given)
            gradients.add(weights, i, j)
        x_grad, y_grad, scale_grad = gradients.result(scale, unit)
        x_grad, y_grad = like(x.dtype, x_grad), like(y.dtype, y_grad)
        return x_grad, y_grad, scale_grad, None, None, None, None, None


class _Running:
    """A log-sum-exp for each of many sums whose terms come bit by bit: 2^peaks sums."""

    def __init__(self, length: int, scale: Tensor) -> None:
        self.peaks = scale.new_full((length,), torch.finfo(scale.dtype).min)
        self.sums = scale.new_zeros(length)

    def add(self, part: slice, peaks: Tensor, sums: Tensor) -> None:
        """Take 2^peaks sums into a part."""
        old = self.peaks[part]
        new = torch.maximum(old, peaks)
        self.sums[part] = self.sums[part] * (old - new).exp2_() + sums * (peaks - new).exp2_()
        self.peaks[part] = new

    def add_apart(self, part: slice, logits: Tensor, dim: int, memory: Tensor) -> None:
        """Take a tile's logits along `dim` into a part, each sum relative to its own greatest."""
        peaks = logits.amax(dim).clamp_min_(torch.finfo(logits.dtype).min)
        powers = torch.sub(logits, peaks.unsqueeze(dim), out=fit(memory, logits.shape)).exp2_()
        self.add(part, peaks, powers.sum(dim))

    def result(self) -> Tensor:
        """What came so far; -inf where nothing or only -inf came."""
        return self.peaks + self.sums.log2()


def _add_together(rows: _Running, columns: _Running, i: slice, j: slice, logits: Tensor, memory: Tensor) -> bool:
    """Take a tile's logits into rows and columns with one power each, if none of the sums is too small for that."""
    if not _answers_at_once(logits):
        return False
    peak = (logits.amax() - HEADROOM).clamp_min_(torch.finfo(logits.dtype).min)
    powers = torch.sub(logits, peak, out=fit(memory, logits.shape)).exp2_()
    row_sums, column_sums = powers.sum(1), powers.sum(0)
    smallest = torch.finfo(logits.dtype).tiny / torch.finfo(logits.dtype).eps ** 2
    fits = bool(row_sums.min() > smallest) and bool(column_sums.min() > smallest)
    if fits:
        rows.add(i, peak, row_sums)
        columns.add(j, peak, column_sums)
    return fits


def _weights_together(
    logits: Tensor,  # [rows, columns] of a tile
    row_lse: Tensor,  # [rows]
    column_lse: Tensor,  # [columns]
    row_grad: Tensor,  # [rows] at most 1
    column_grad: Tensor,  # [columns] at most 1
    memory: tuple[Tensor, Tensor],
) -> Tensor | None:  # [rows, columns] gradients of the logits
    """Softmax over the row and over the column times their gradients, from one power if the range allows it."""
    if not _answers_at_once(logits):
        return None
    low, high = (min(row_lse.min(), column_lse.min()), max(row_lse.max(), column_lse.max()))
    if not bool(high - low < SPAN):
        return None
    middle = (low + high) / 2
    powers = torch.sub(logits, middle, out=fit(memory[0], logits.shape)).exp2_()
    of_rows, of_columns = row_grad * (middle - row_lse).exp2_(), column_grad * (middle - column_lse).exp2_()
    return powers.mul_(torch.add(of_rows[:, None], of_columns, out=fit(memory[1], logits.shape)))


def _weights_apart(
    logits: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    row_grad: Tensor,
    column_grad: Tensor,
    memory: tuple[Tensor, Tensor],
) -> Tensor:
    """The same for any range."""
    by_row = torch.sub(logits, row_lse[:, None], out=fit(memory[0], logits.shape)).exp2_()
    by_column = torch.sub(logits, column_lse, out=fit(memory[1], logits.shape)).exp2_()
    return by_row.mul_(row_grad[:, None]).addcmul_(by_column, column_grad)


def _answers_at_once(x: Tensor) -> bool:
    """Whether a question about values does not have to wait for the device, and there are values (`rehearsal`)."""
    return x.device.type == "cpu" and type(x) is Tensor
