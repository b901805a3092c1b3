"""InfoNCE, the loss of CLIP."""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from multimodal import distributed
from multimodal.batch import Features
from multimodal.losses.inputs import check_inputs
from multimodal.losses.logsumexp import negatives
from multimodal.losses.pairs import PairLoss
from multimodal.losses.targets import soft_partners
from multimodal.losses.tiles import TILE, product_dtype, sums_dtype

KEPT_LOGITS = 4096**2
"""So many logits of a rank are kept for the backward (64 MiB in float32) rather than computed again."""


def info_nce(
    x: Tensor,  # [b, D] unit norm, one modality
    y: Tensor,  # [b, D] unit norm, the other
    logit_scale: Tensor,  # [] already exponentiated
    *,
    label_smoothing: float = 0.0,  # the part of each target that is spread over all rows
    ids: Tensor | None = None,  # int64 [b], rows of equal ids are the same thing
    same: Literal["positive", "masked"] = "positive",  # what pairs of different rows of equal ids are
    tile: int = TILE,
    keep_logits: bool | None = None,  # None: where there are at most KEPT_LOGITS of them
) -> Tensor:  # [] the loss of the global batch, on every rank
    """Symmetric cross-entropy of every pair against every pair on every rank.

    The matrix of logits is computed in tiles, each once for rows and columns, and again in the backward: memory grows
    with B. Small ones are kept instead (3 products rather than 4). Sums are in at least float32, whatever autocast
    says; products are in the dtype of the features, or in bf16 where autocast to it is on at the call. The positive
    is kept out of the sums, so that small losses and their gradients are accurate.

    - Equals open_clip's `ClipLoss` with `local_loss` and `gather_with_grad`; on one process, `ClipLoss` as it is.
      log B for features that are all equal.
    - `label_smoothing`: equals `F.cross_entropy(..., label_smoothing=...)` in both directions.
    - `same="positive"`: the target of a row is uniform over the rows of its id. Equals the loss of UniCL (Yang et al.
      2022) and, for ids that are classes, the outer form of SupCon (Khosla et al. 2020) across two modalities.
    - `same="masked"`: other rows of its id are left out of a row's denominator, and of what smoothing is spread over.
      A row with nothing else left costs 0.
    - With ids that are all different both equal the loss without ids.

    Gradients of the features are those of the sum of this over ranks (see `distributed`). ValueError, on all ranks, for
    rows that do not match, also between ranks.

    Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", figure 3.
    """
    smoothed = "" if 0 <= label_smoothing < 1 else f"label_smoothing should be in [0, 1), got {label_smoothing}"
    precision, device = product_dtype(x, y), x.device.type
    check_inputs(x, y, ids, f"InfoNCE of {same} pairs in {precision}, label_smoothing={label_smoothing}", smoothed)
    with torch.autocast(device, enabled=False):
        scale = logit_scale.to(sums_dtype(precision))
        own = distributed.own_rows(x)
        y = distributed.gather(y)
        ids = None if ids is None else distributed.gather(ids)
        excluded = (ids[own], ids) if ids is not None and same == "masked" else None
        keep = len(x) * len(y) <= KEPT_LOGITS if keep_logits is None else keep_logits
        keep = keep and torch.is_grad_enabled()
        partner, row, column = negatives(x, y, scale, precision, tile, keep, own.start, excluded)
        column = distributed.logsumexp(column)[own]
        losses = -(F.logsigmoid(partner - row) + F.logsigmoid(partner - column)) / 2
        if label_smoothing or (ids is not None and same == "positive"):
            shift = soft_partners(y.to(scale.dtype), own, label_smoothing, ids, masked=same == "masked")
            losses = losses + scale * torch.linalg.vecdot(x.to(scale.dtype), shift)
        # Infinite features could cost nothing; 0 times infinity is not a number.
        return distributed.mean(losses.mean() + 0 * partner.mean())


class InfoNCE(PairLoss):
    """Symmetric cross-entropy of matching pairs against all others in the batch, as in CLIP."""

    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """The part of each target that is spread evenly over the batch."""

    def compare(self, x: Tensor, y: Tensor, features: Features) -> Tensor:
        targets = self.targets(features)
        return info_nce(x, y, features.logit_scale, label_smoothing=self.label_smoothing, **targets)
