"""Inputs of different lengths, cut so that less of what is computed is padding: on a CPU in chunks of like length."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

OVERHEAD = 128
"""What a chunk costs beside its tokens, as so many tokens, on a CPU."""

MULTIPLE = 16
"""Of tokens, that all of a batch are filled up to on other devices."""


def chunks(
    lengths: np.ndarray,  # [n] ascending
) -> list[tuple[int, int]]:  # rows, and the length that they are filled up to
    """The division into chunks, in order, that costs least: tokens, padding among them, and so many for each chunk."""
    values, counts = np.unique(lengths, return_counts=True)
    ends = np.concatenate([[0], counts.cumsum()])  # rows up to each value; a chunk never parts equal ones
    costs, starts = np.zeros(len(ends), dtype=np.int64), np.zeros(len(ends), dtype=np.int64)
    for end, value in enumerate(values, start=1):
        ways = costs[:end] + (ends[end] - ends[:end]) * value
        starts[end] = ways.argmin()
        costs[end] = ways[starts[end]] + OVERHEAD
    found, end = [], len(values)
    while end:
        start = int(starts[end])
        found.append((int(ends[end] - ends[start]), int(values[end - 1])))
        end = start
    return found[::-1]


def by_length(
    encode: Callable[..., Tensor],  # from inputs, or the beginning of all of them, to [n, W]
    inputs: Tensor,  # [n, L, ...]
    lengths: Tensor,  # int64 [n], on the CPU; what is beyond them changes nothing
    embedding: nn.Module | None = None,  # of token ids; `encode` then takes what it makes of the inputs, too
) -> Tensor:  # [n, W]
    """What `encode` makes of the inputs, each cut to about its length; nothing waits for the device.

    A CPU computes them in chunks. All of these are embedded at once: the gradient of a table is as large as the table,
    however few rows it is for. Other devices compute all rows together, cut to one of a few lengths: chunks cost more
    there than padding does.
    """
    if inputs.device.type != "cpu":
        return encode(inputs[:, : MULTIPLE * math.ceil(int(lengths.max()) / MULTIPLE)])
    order = lengths.argsort(stable=True)
    found = chunks(lengths[order].numpy())
    if len(found) == 1:
        return encode(inputs[:, : found[0][1]])
    rows = torch.split(inputs[order], [count for count, _ in found])
    cut = [some[:, :length] for some, (_, length) in zip(rows, found, strict=True)]
    embedded = [] if embedding is None else [_all_at_once(embedding, cut)]
    made = torch.cat([encode(*one) for one in zip(cut, *embedded, strict=True)])
    return torch.empty_like(made).index_copy(0, order, made)


def _all_at_once(embedding: nn.Module, ids: list[Tensor]) -> list[Tensor]:
    embedded = torch.split(embedding(torch.cat([some.flatten() for some in ids])), [some.numel() for some in ids])
    return [some.view(*like.shape, -1) for some, like in zip(embedded, ids, strict=True)]
