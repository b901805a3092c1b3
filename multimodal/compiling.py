"""Towers compiled by torch, with the same random masks in both passes of micro-batches."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch._inductor.config
from torch._dynamo.utils import counters
from torch._inductor.exc import InductorError
from torch._inductor.runtime.cache_dir_utils import cache_dir

from multimodal.config import RunError
from multimodal.model import Model


def compile_towers(model: Model) -> None:
    """From their next call on; names of weights stay.

    Losses are not compiled: nearly all of their time is in products of matrices. Random masks are drawn by torch's own
    generators rather than by the compiler's, which draw others without gradient than with it.
    """
    torch._inductor.config.fallback_random = True
    for tower in model.towers.values():
        tower.compile()


@contextmanager
def failing_is_explained() -> Iterator[None]:
    """Turn what torch's compiler ends in into a RunError in a few words."""
    try:
        yield
    except InductorError as error:
        told = next((line for line in str(error).splitlines() if line), "")
        raise RunError(
            f"compile=true: torch's compiler failed ({told}). If it was interrupted, now or before, what it has not "
            f"finished is in the way: delete {cache_dir()}; or compile=false"
        ) from error


def graph_breaks() -> int:
    """At how many places compiled code went back to Python, so far in this process."""
    return sum(counters["graph_break"].values())
