"""How many rows' activations fit into memory."""

import json
import logging
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from multimodal import distributed
from multimodal.batch import Batch
from multimodal.config import RunError, TrainConfig
from multimodal.files import write_json
from multimodal.model import Model
from multimodal.step import Chunk, buffers_left_alone, encode_chunk

logger = logging.getLogger(__name__)

FOUND = "micro_batch_size.json"
"""In a run's folder: what micro_batch_size=auto has found."""
SHARE = 0.8
"""Of the free memory that may be used; the rest is for what libraries keep for themselves, and for fragments."""
BESIDE = 4
"""Times the trained weights that must fit beside activations: gradients, their sum over ranks, and two moments."""
PROBES = (2, 4)
"""Rows that are tried; what a forward pass keeps of one more row is their difference."""
USED_UP = ("can't allocate memory", "out of memory")
"""What torch says, on a CPU and on a GPU."""


class Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that are made while it is active: those alive now, and the most at one time."""

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
    limit, used = (Path(f"/sys/fs/cgroup/memory.{kind}") for kind in ("max", "current"))  # of a container
    if limit.exists() and used.exists() and limit.read_text().strip().isdigit():
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def has_batch_norm(model: Model) -> bool:
    """Whether features depend on which rows are encoded together, as they do under a batch norm that is trained."""
    training = model.training
    found = any(module.training for module in model.train().modules() if isinstance(module, _BatchNorm))
    model.train(training)
    return found


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

    A few rows say where to begin; a pass over as many as are then chosen says whether they fit. With a batch norm that
    is trained it is all rows, as nothing less will do.
    """
    rows = len(batch.indices)
    if rows <= PROBES[-1] or has_batch_norm(model):
        return rows
    beside = BESIDE * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    budget = int(SHARE * free_bytes(model.logit_scale.device)) - beside
    few, more = (_passes(model, batch, context, probe)[0] for probe in PROBES)
    guess = budget // max(1, (more - few) // (PROBES[1] - PROBES[0]))
    size = rows if guess >= rows else 1 << (guess.bit_length() - 1) if guess > 0 else 0
    while size and not _fits(model, batch, context, size, budget):
        size //= 2
    size = distributed.smallest(size)
    if size == 0:
        raise RunError("the activations of a single row do not fit into memory: a smaller model, or grad_checkpointing")
    return size


def kept_micro_batch(folder: Path, model: Model, batch: Batch, context: torch.autocast) -> int:
    """What `auto` means in a run: found at its first step, kept in its folder, and the same whenever it goes on."""
    file = folder / FOUND
    found = distributed.on_first_rank(lambda: json.loads(file.read_text()) if file.exists() else None)
    if found is None:
        found = micro_batch_that_fits(model, batch, context)
        distributed.on_first_rank(lambda: write_json(file, found))
    logger.info("micro_batch_size=auto: %d of %d rows at a time", found, len(batch.indices))
    return int(found)


def _fits(model: Model, batch: Batch, context: torch.autocast, rows: int, budget: int) -> bool:
    try:
        return _passes(model, batch, context, rows)[1] <= budget
    except RuntimeError as error:
        if not _is_used_up(error):
            raise
        return False


def _passes(model: Model, batch: Batch, context: torch.autocast, rows: int) -> tuple[int, int]:
    """Forward and backward through every tower, one after the other, as for a micro-batch; leaves no gradients.

    The bytes that the hungriest tower keeps for its backward pass, and the peak of all that is made on the way.
    """
    kept = 0
    with buffers_left_alone(model), Peak() as peak:
        for tower in model.towers:
            before = peak.alive
            features = encode_chunk(model, batch, context, Chunk(tower, slice(0, rows), seed=0))
            kept = max(kept, peak.alive - before)
            trained = [tensor.sum() for tensor in features.values() if tensor.requires_grad]
            if trained:
                torch.autograd.backward(trained)
            del features, trained
        model.zero_grad(set_to_none=True)
    return kept, peak.bytes


def _is_used_up(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(told in str(error) for told in USED_UP)


@contextmanager
def running_out_is_explained(micro_batch_size: int | None, rows: int, global_batch_size: int) -> Iterator[None]:
    """Turn what torch says when memory is used up into a RunError that says what can be done."""
    try:
        yield
    except RuntimeError as error:
        if not _is_used_up(error):
            raise
        at_a_time = min(micro_batch_size or rows, rows)
        way_out = "A smaller model, or grad_checkpointing of a tower, takes less memory"
        if at_a_time > 1:
            way_out = (
                f"A smaller micro_batch_size, such as {at_a_time // 2}, computes the same with less memory (not with "
                "batch norm, which needs the whole batch)"
            )
        raise RunError(
            f"out of memory with {at_a_time} rows at a time, of the {rows} that this rank has of "
            f"global_batch_size={global_batch_size}. {way_out}"
        ) from error
