"""For every row and every column of the logits, how strong its negatives are: their log-sum-exp, without the matrix."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from multimodal.losses.gradients import Gradients, like
from multimodal.losses.tiles import LOG2_E, Tiles, fit


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
    """Logits are in units of log 2 here: exp2 is faster than exp, many times so where it underflows."""

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
            rows.add(i, logits, 1, memory)
            columns.add(j, logits, 0, memory)
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
            of_rows, of_columns = (fit(one, (logits.shape[0], logits.shape[1])) for one in memory)
            weights = torch.sub(logits, row_lse[i, None], out=of_rows).exp2_().mul_(row_grad[i, None])
            weights.addcmul_(torch.sub(logits, column_lse[j], out=of_columns).exp2_(), column_grad[j])
            gradients.add(weights, i, j)
        x_grad, y_grad, scale_grad = gradients.result(scale, unit)
        x_grad, y_grad = like(x.dtype, x_grad), like(y.dtype, y_grad)
        return x_grad, y_grad, scale_grad, None, None, None, None, None


class _Running:
    """A log-sum-exp over numbers that come bit by bit, in units of log 2."""

    def __init__(self, length: int, like: Tensor) -> None:
        self.peaks = like.new_full((length,), torch.finfo(like.dtype).min)
        self.sums = like.new_zeros(length)

    def add(self, part: slice, logits: Tensor, dim: int, memory: Tensor) -> None:
        """Take the logits along `dim` of a tile into the sums of a part."""
        old = self.peaks[part]
        peaks = logits.amax(dim).clamp_min_(torch.finfo(logits.dtype).min)
        powers = torch.sub(logits, peaks.unsqueeze(dim), out=fit(memory, (logits.shape[0], logits.shape[1]))).exp2_()
        new = torch.maximum(old, peaks)
        self.sums[part] = self.sums[part] * (old - new).exp2_() + powers.sum(dim) * (peaks - new).exp2_()
        self.peaks[part] = new

    def result(self) -> Tensor:
        """What came so far; -inf where nothing or only -inf came."""
        return self.peaks + self.sums.log2()
