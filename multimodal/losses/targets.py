"""Which pairs of a batch belong together, and what targets other than one-hot add to the loss."""

import torch
from torch import Tensor


class Groups:
    """Rows of equal ids, without asking the device how many there are."""

    def __init__(
        self,
        ids: Tensor,  # int64 [n]
    ) -> None:
        order = ids.argsort()
        numbers = (ids[order].diff(prepend=ids[order[:1]]) != 0).cumsum(0)
        self.numbers = torch.empty_like(ids).scatter_(0, order, numbers)  # [n], below n

    def sum(
        self,
        values: Tensor,  # [n, ...]
    ) -> Tensor:  # [n, ...], by number of the group
        """The values of each group added up, with gradient."""
        return torch.zeros_like(values).index_add(0, self.numbers, values)


def share_of_duplicates(
    ids: Tensor,  # int64 [B], of all ranks
) -> Tensor:  # [], at most 1
    """How many rows have the id of another: of captions, negatives that are none."""
    _, counts = torch.unique(ids, return_counts=True)
    share: Tensor = counts[counts > 1].sum() / counts.sum()
    return share


def soft_partners(
    y: Tensor,  # [B, D], of all ranks
    own: slice,  # this rank's rows
    label_smoothing: float,
    ids: Tensor | None,  # int64 [B]
    masked: bool,  # whether other pairs of equal ids are left out, or positives
) -> Tensor:  # [b, D]
    """By what vector v_i the targets miss the partner: they add x_i . v_i to the loss of one-hot targets of a row.

    The mean, over the two directions, of y_i minus the expectation of y under the target of row i. It is exactly 0 for
    rows whose target is one-hot, so that their loss and gradient are as accurate as without. All of it is
    linear in y: no logit is computed.
    """
    partner = y[own]
    shift = torch.zeros_like(partner)
    if ids is None:
        return label_smoothing * (partner - y.mean(0)) if label_smoothing else shift
    groups = Groups(ids)
    own_groups = groups.numbers[own]
    sizes = groups.sum(torch.ones_like(y[:, 0]))
    if not masked:
        means = (groups.sum(y) / sizes.clamp_min(1)[:, None])[own_groups]
        return (1 - label_smoothing) * (partner - means) + label_smoothing * (partner - y.mean(0))
    if not label_smoothing:
        return shift
    # Row i spreads evenly over those that are left in it; column j over those left in it, as many as in row j.
    share = 1 / (len(y) - sizes[groups.numbers] + 1)
    weighted = share[:, None] * y
    by_row = share[own, None] * (y.sum(0) - groups.sum(y)[own_groups] + partner)
    by_column = weighted.sum(0) - groups.sum(weighted)[own_groups] + weighted[own]
    return label_smoothing * (partner - (by_row + by_column) / 2)
