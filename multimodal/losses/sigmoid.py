"""The sigmoid loss of SigLIP."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from multimodal import distributed
from multimodal.batch import Features
from multimodal.losses.gradients import Gradients, like
from multimodal.losses.inputs import check_inputs
from multimodal.losses.pairs import PairLoss
from multimodal.losses.softplus import sum_softplus
from multimodal.losses.tiles import TILE, Tiles, fit, partners, product_dtype, sums_dtype
from multimodal.parts import Operational


def sigmoid_loss(
    x: Tensor,  # [b, D] unit norm, one modality
    y: Tensor,  # [b, D] unit norm, the other
    logit_scale: Tensor,  # [] already exponentiated
    logit_bias: Tensor,  # []
    *,
    ids: Tensor | None = None,  # int64 [b], rows of equal ids are the same thing
    same: Literal["positive", "masked"] = "positive",  # what pairs of different rows of equal ids are
    exchange: Literal["gather", "ring"] = "gather",  # how ranks come by each other's rows; the result is the same
    tile: int = TILE,
) -> Tensor:  # [] the loss of the global batch, on every rank
    """Each pair by itself, on every rank: does it belong together? Summed over all pairs, divided by B.

    The matrix of logits is computed once, in tiles, and the gradient along with it: what is saved is as large as the
    features. With `exchange="ring"` a rank holds no more of `y` than its own rows, those of one other rank and those
    that it receives, for as many messages as there are ranks; else all rows are gathered. Precision of sums and
    products is as in `info_nce`.

    - Equals open_clip's `SigLipLoss`, on several ranks with any of its `dist_impl` (the mean over ranks).
    - `same="positive"`: pairs of equal ids belong together. `same="masked"`: they do not count, but partners do.
    - With ids that are all different both equal the loss without ids.

    Gradients of the features are those of the sum of this over ranks (see `distributed`). ValueError, on all ranks, for
    rows that do not match, also between ranks.

    Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training".
    """
    precision, device = product_dtype(x, y), x.device.type
    check_inputs(x, y, ids, f"sigmoid loss of {same} pairs in {precision} by {exchange}")
    with torch.autocast(device, enabled=False):
        scale, bias = (z.to(sums_dtype(precision)) for z in (logit_scale, logit_bias))
        own = None
        if exchange == "gather":
            own, y = distributed.own_rows(x), distributed.gather(y)
        y_ids = distributed.gather(ids) if ids is not None and own is not None else ids
        settings = _Settings(precision, tile, own, same == "masked", torch.is_grad_enabled())
        loss: Tensor = _Sigmoid.apply(x, y, scale, bias, ids, y_ids, settings)
        return distributed.mean(loss / len(x))


@dataclass(frozen=True)
class _Settings:
    precision: torch.dtype
    """Of products."""
    tile: int
    own: slice | None
    """Where the partners of the rows of x are in y; None if y is this rank's rows and travels in the ring."""
    masked: bool
    train: bool
    """Whether gradients are wanted at all."""


class _Sigmoid(torch.autograd.Function):
    """The sum over the rows of x of the losses of their pairs; its gradients are computed in the forward.

    Those of x and y are without the factor of the scale until the end.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [b, D]
        y: Tensor,  # [b or B, D]
        scale: Tensor,  # []
        bias: Tensor,  # []
        x_ids: Tensor | None,  # [b]
        y_ids: Tensor | None,  # [b or B]
        settings: _Settings,
    ) -> Tensor:
        needs = [settings.train and needed for needed in ctx.needs_input_grad[:3]]
        gradients = Gradients(x, y, needs, settings.precision)
        if settings.own is not None:
            sums = _pairs(gradients, scale, bias, x_ids, y_ids, settings.own.start, settings)
        else:
            sums = scale.new_zeros(2)
            travelling = [y] if y_ids is None else [y, y_ids]
            for hop, ((visitor, *ids), collected) in enumerate(distributed.ring(travelling, gradients.y_grad)):
                visited, first = gradients.visited(visitor, collected), None if hop else 0
                sums += _pairs(visited, scale, bias, x_ids, ids[0] if ids else None, first, settings)
        x_grad, y_grad, scale_grad = gradients.result(scale, scale.new_ones(()))
        ctx.save_for_backward(x_grad, y_grad, scale_grad, sums[1])
        ctx.dtypes = x.dtype, y.dtype
        return sums[0].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_grad, y_grad, scale_grad, bias_grad = (None if one is None else one * grad for one in ctx.saved_tensors)
        return like(ctx.dtypes[0], x_grad), like(ctx.dtypes[1], y_grad), scale_grad, bias_grad, None, None, None


def _pairs(
    gradients: Gradients,  # of all rows of x and y; is added to
    scale: Tensor,  # []
    bias: Tensor,  # []
    x_ids: Tensor | None,  # [n]
    y_ids: Tensor | None,  # [m]
    first: int | None,  # the partner of x[i] is y[first + i]; None: they are elsewhere
    settings: _Settings,
) -> Tensor:  # [2] the sum of the losses, and of their derivatives to the logits
    """Every row of x with every row of y."""
    x, y, sums = gradients.x, gradients.y, scale.new_zeros(2)
    ids = (x_ids, y_ids) if x_ids is not None and y_ids is not None else None
    if first is not None:
        logits = scale * torch.linalg.vecdot(x.to(scale.dtype), y[first : first + len(x)].to(scale.dtype)) + bias
        weights = -torch.sigmoid(-logits)
        gradients.add_partners(weights, first)
        # Infinite features could cost nothing; 0 times infinity is not a number.
        sums += torch.stack([(0 * logits - F.logsigmoid(logits)).sum(), weights.sum()])
    tiles = Tiles(x, y, scale, settings.precision, settings.tile, first, ids if settings.masked else None)
    memory = tiles.scratch()
    for i, j, logits in tiles:
        logits += bias
        signs = None
        if ids is not None and not settings.masked:
            signs = torch.where(ids[0][i, None] == ids[1][j], -1.0, 1.0).to(scale.dtype)
            logits.mul_(signs)
            if first is not None:
                partners(logits, i, j, first).fill_(-torch.inf)
        loss = sum_softplus(logits, fit(memory, logits.shape))
        weights = logits.sigmoid_()
        if signs is not None:
            weights.mul_(signs)
        sums += torch.stack([loss, weights.sum()])
        gradients.add(weights, i, j)
    return sums


class Sigmoid(PairLoss):
    """Each pair of the batch by itself is told to match or not, as in SigLIP. Needs `model.logit_bias`."""

    exchange: Operational[Literal["gather", "ring"]] = "gather"
    """Whether ranks gather all rows of one tower, or pass them round, which takes less memory and more messages."""

    def needs(self) -> frozenset[str]:
        return super().needs() | {"logit_bias"}

    def compare(self, x: Tensor, y: Tensor, features: Features) -> Tensor:
        assert features.logit_bias is not None
        targets = self.targets(features)
        return sigmoid_loss(x, y, features.logit_scale, features.logit_bias, exchange=self.exchange, **targets)
