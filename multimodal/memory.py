"""How many rows' activations fit into memory."""

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from multimodal import distributed
from multimodal.batch import Batch
from multimodal.config import RunError, TrainConfig
from multimodal.model import Model
from multimodal.step import has_batch_norm, tower_passes

SHARE = 0.8
"""Of the free memory that may be used; the rest is for what libraries keep for themselves, and for fragments."""
PROBES = (2, 4)
"""Rows that are tried; what one more row needs is their difference."""


class Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that are made while it is active, and are alive at the same time, at most."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.alive = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self.known:
            return
        self.known.add(id(storage))
        self.alive += storage.nbytes()
        self.bytes = max(self.bytes, self.alive)
        weakref.finalize(storage, self._forget, id(storage), storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size


def free_bytes(device: torch.device) -> int:
    """What this process may still take, of a GPU, or of its share of the machine's memory."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    meminfo = Path("/proc/meminfo")
    known = dict(line.split(":") for line in meminfo.read_text().splitlines()) if meminfo.exists() else {}
    if "MemAvailable" in known:
        free = int(known["MemAvailable"].split()[0]) * 1024
    else:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def check_micro_batches(model: Model, config: TrainConfig) -> None:
    """ValueError if micro-batches would not compute what the whole batch does."""
    size, rows = config.micro_batch_size, config.global_batch_size // distributed.world_size()
    if isinstance(size, int) and size < rows and has_batch_norm(model):
        raise ValueError(
            "the statistics of a batch norm are those of the whole batch, which micro-batches do not see: null, a "
            "tower without batch norm, or one that is frozen"
        )


def micro_batch_that_fits(model: Model, batch: Batch, context: torch.autocast) -> int:
    """All rows of the batch, or the largest power of two whose activations fit, on all ranks; RunError if none do.

    What a row needs is measured on a few rows. Beside activations there must be room for gradients and two moments.
    """
    rows = len(batch.indices)
    if rows <= PROBES[-1] or has_batch_norm(model):
        return rows
    peaks = []
    for probe in PROBES:
        with Peak() as peak:
            tower_passes(model, batch, context, probe)
        peaks.append(peak.bytes)
    per_row = max(1, -(-(peaks[1] - peaks[0]) // (PROBES[1] - PROBES[0])))
    reserved = 3 * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    fitting = int(SHARE * free_bytes(model.logit_scale.device) - reserved) // per_row
    fitting = distributed.smallest(max(0, fitting))
    if fitting == 0:
        raise RunError(f"the activations of a single row, {per_row:,} bytes, do not fit into memory: a smaller model")
    return rows if fitting >= rows else 1 << (fitting.bit_length() - 1)


@contextmanager
def running_out_is_explained(micro_batch_size: int | None, rows: int, global_batch_size: int) -> Iterator[None]:
    """Turn what torch says when memory is used up into a RunError that says what can be done."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        at_a_time = min(micro_batch_size or rows, rows)
        raise RunError(
            f"out of memory with {at_a_time} rows at a time, of the {rows} that this rank has of "
            f"global_batch_size={global_batch_size}. A smaller micro_batch_size, such as {max(1, at_a_time // 2)}, "
            "computes the same with less memory"
        ) from error
