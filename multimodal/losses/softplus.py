"""Sums of softplus, most of whose time would go into logarithms."""

import torch
from torch import Tensor

from multimodal.losses.tiles import LOG2_E


def sum_softplus(
    z: Tensor,
    memory: Tensor,  # of the shape of z, is overwritten
) -> Tensor:  # []
    """The sum of log(1 + exp(z)), as accurate as one by one but with few logarithms, which are slow.

    A sum of logarithms is one of a product, and 1 + c = (1 + a) (1 + b) has c = a + b + ab, of which nothing is lost
    where a and b are small.
    """
    total = torch.clamp(z, min=0, out=memory).sum()
    rest = torch.abs(z, out=memory).mul_(-LOG2_E).exp2_().view(-1)
    for _ in range(6):  # products of 64 factors of at most 2
        half = len(rest) // 2
        total += rest[2 * half :].log1p().sum()
        rest, other = rest[:half], rest[half : 2 * half]
        rest += other.addcmul_(rest, other)
    return total + rest.log1p().sum()
