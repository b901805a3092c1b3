"""Towers compiled by torch, with the same random masks in both passes of micro-batches."""

import torch._inductor.config
from torch._dynamo.utils import counters

from multimodal.model import Model


def compile_towers(model: Model) -> None:
    """From their next call on; names of weights stay.

    Losses are not compiled: nearly all of their time is in products of matrices. Random masks are drawn by torch's own
    generators rather than by the compiler's, which draw others without gradient than with it.
    """
    torch._inductor.config.fallback_random = True
    for tower in model.towers.values():
        tower.compile()


def graph_breaks() -> int:
    """At how many places compiled code went back to Python, so far in this process."""
    return sum(counters["graph_break"].values())
