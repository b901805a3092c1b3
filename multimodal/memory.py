"""How many rows' activations fit into memory."""

import json
import logging
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from multimodal import distributed
from multimodal.batch import Batch
from multimodal.config import RunError, TrainConfig
from multimodal.files import write_json
from multimodal.model import Model
from multimodal.parts import Loss
from multimodal.step import Chunk, buffers_left_alone, encode_chunk, kernels, objective
from multimodal.towers.batch_norm import trained_batch_norms

logger = logging.getLogger(__name__)

FOUND = "micro_batch_size.json"
"""In a run's folder: what micro_batch_size=auto has found."""
SHARE = 0.8
"""Of the free memory that may be used; the rest is for what libraries keep for themselves, and for fragments."""
MOMENTS = 2
"""Times the trained weights that an optimizer keeps, at most."""
BESIDE = MOMENTS + 1
"""Times the trained weights that must fit beside a pass and its gradients: moments, and room for an update."""
PROBES = (2, 4)
"""Rows that are tried; what a forward pass keeps of one more row is their difference."""
USED_UP = ("can't allocate memory", "out of memory", "_ALLOC_FAILED")
"""What torch, and the libraries of a GPU, say."""


class Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that are made while it is active: those alive now, and the most at one time.

    What is a view of tensors that were there before is taken for new, unless they are named.
    """

    def __init__(self, before: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.alive = 0
        self.before = [tensor.untyped_storage() for tensor in before]
        self.known = {id(storage) for storage in self.before}

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


def check_micro_batches(model: Model, config: TrainConfig) -> None:
    """ValueError if micro-batches would not compute what the whole batch does."""
    size, rows = config.micro_batch_size, config.global_batch_size // distributed.world_size()
    if isinstance(size, int) and size < rows and trained_batch_norms(model):
        raise ValueError(
            "the statistics of a batch norm are those of the whole batch, which micro-batches do not see. It should be "
            "null, or the tower one without batch norm (tower@towers.image=vit_tiny), or frozen"
        )


def kept_micro_batch(config: TrainConfig, model: Model, batch: Batch, context: torch.autocast) -> int:
    """What `auto` means in a run: found at its first step, kept in its folder, and the same whenever it goes on.

    On other ranks, or where one of them has another device than the first had, it is found anew.
    """
    file, rows, device = config.folder / FOUND, len(batch.indices), _name(model.logit_scale.device)
    kept = distributed.on_first_rank(lambda: json.loads(file.read_text()) if file.exists() else {})
    same = (kept.get("rows"), kept.get("device")) == (rows, device)
    if not distributed.smallest(int(same)):  # ranks search together, or none does
        trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        copied = checkpoint_copy(config, model, MOMENTS * trained) if model.logit_scale.device.type == "cpu" else 0
        size = micro_batch_that_fits(model, config.loss, batch, context, copied)
        kept = {"micro_batch_size": size, "rows": rows, "device": device}
        distributed.on_first_rank(lambda: write_json(file, kept))
    logger.info("micro_batch_size=auto: %d of %d rows at a time", kept["micro_batch_size"], rows)
    return int(kept["micro_batch_size"])


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def checkpoint_copy(config: TrainConfig, model: Model, optimizer: int) -> int:
    """Bytes of all that is saved, whole also where it is sharded; 0 where no step is taken meanwhile."""
    settings = config.checkpoint
    if not settings.background or (settings.every.unit == "never" and settings.best is None):
        return 0
    weights: int = sum(x.nbytes for x in model.state_dict().values())
    return weights * (1 if config.ema.decay is None else 2) + optimizer


def micro_batch_that_fits(
    model: Model, losses: Mapping[str, Loss], batch: Batch, context: torch.autocast, copied: int = 0
) -> int:
    """All rows of the batch, or the largest power of two whose activations fit, on all ranks; RunError if none do.

    A few rows say where to begin; a pass over as many as are then chosen says whether they fit, beside features and
    losses of the whole batch, and the bytes that are `copied` for a checkpoint. With a batch norm that is trained it is
    all rows, as nothing less will do.
    """
    rows = len(batch.indices)
    batch = replace(batch, lengths={})  # another one may have captions that fill the context
    if rows <= PROBES[-1] or trained_batch_norms(model):
        return rows
    held = sum(distributed.local(p).nbytes for p in model.parameters() if p.requires_grad)
    budget = int(SHARE * free_bytes(model.logit_scale.device)) - BESIDE * held - copied
    with buffers_left_alone(model):
        try:
            # Sharded, ranks wait for each other in every pass: they go through the same ones.
            budget = distributed.smallest(budget - _batch_bytes(model, losses, batch, context))
            sizes = _sizes(model, batch, context, budget)
            size = next((size for size in sizes if _fits(model, batch, context, size, budget)), 0)
        finally:
            model.zero_grad(set_to_none=True)
    if size == 0:
        raise RunError("the activations of a single row do not fit into memory: a smaller model, or grad_checkpointing")
    return size


def _batch_bytes(model: Model, losses: Mapping[str, Loss], batch: Batch, context: torch.autocast) -> int:
    """What features of the whole batch, their gradients and the losses take at their peak, as if all were trained."""
    rows = len(batch.indices)
    with torch.no_grad():
        one = {tower: encode_chunk(model, batch, context, _chunk(tower, 1)) for tower in model.towers}
    with Peak() as peak:
        features = {
            tower: {name: _unit_rows(x, rows).requires_grad_() for name, x in named.items()}
            for tower, named in one.items()
        }
        total, _ = objective(model, losses, batch, features)
        total.backward()  # type: ignore[no-untyped-call]
    taken: int = peak.bytes
    return taken


def _unit_rows(row: Tensor, number: int) -> Tensor:
    return F.normalize(torch.randn_like(row.repeat(number, 1)))


def _sizes(model: Model, batch: Batch, context: torch.autocast, budget: int) -> Iterator[int]:
    """From the largest: what may fit, by what a forward pass keeps of a few rows; the same on all ranks."""
    rows = len(batch.indices)
    few, more = (_passes(model, batch, context, probe) for probe in PROBES)
    if not distributed.smallest(int(few is not None and more is not None)) or few is None or more is None:
        return
    kept = torch.tensor([(b - a) / (PROBES[1] - PROBES[0]) for a, b in zip(few[0], more[0], strict=True)])
    by_tower = distributed.largest(kept).tolist()  # ranks count a little differently, and must try the same sizes
    if sum(by_tower) * rows <= budget:
        yield rows
    size = 1 << ((rows - 1).bit_length() - 1)
    while size:
        if max(by_tower) * size <= budget:
            yield size
        size //= 2


def _fits(model: Model, batch: Batch, context: torch.autocast, rows: int, budget: int) -> bool:
    """On all ranks."""
    found = _passes(model, batch, context, rows)
    return bool(distributed.smallest(int(found is not None and found[1] <= budget)))


def _passes(model: Model, batch: Batch, context: torch.autocast, rows: int) -> tuple[list[int], int] | None:
    """Forward and backward, tower after tower for a micro-batch, through all of them together for the whole batch.

    The bytes that each tower keeps for its backward pass, and the peak of all that is made on the way; None where
    memory was used up.
    """
    try:
        return _measured(model, batch, context, rows)
    except RuntimeError as error:
        if not _is_used_up(error):
            raise
        return None


def _measured(model: Model, batch: Batch, context: torch.autocast, rows: int) -> tuple[list[int], int]:
    kept, alive = [], []
    with kernels(context), Peak() as peak:
        for tower in model.towers:
            before = peak.alive
            features = encode_chunk(model, batch, context, _chunk(tower, rows))
            kept.append(peak.alive - before)
            alive += [tensor.sum() for tensor in features.values() if tensor.requires_grad]
            del features
            if rows < len(batch.indices):
                _go_back(alive)
        _go_back(alive)
        model.zero_grad(set_to_none=True)
    return kept, peak.bytes


def _chunk(tower: str, rows: int) -> Chunk:
    return Chunk(tower, slice(0, rows), seed=0)


def _go_back(totals: list[Tensor]) -> None:
    if totals:
        torch.autograd.backward(totals)
        totals.clear()


def _is_used_up(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(told in str(error) for told in USED_UP)


@contextmanager
def running_out_is_explained(
    micro_batch_size: int | Literal["auto"] | None,  # auto while it is searched for
    rows: int,
    global_batch_size: int,
) -> Iterator[None]:
    """Turn what torch says when memory is used up into a RunError that says what can be done."""
    try:
        yield
    except RuntimeError as error:
        if not _is_used_up(error):
            raise
        of_all = f"the {rows} that this rank has of global_batch_size={global_batch_size}"
        if micro_batch_size == "auto":
            raise RunError(
                f"out of memory in the search for a micro_batch_size: a row, or features and losses of {of_all}, do "
                "not fit. A smaller global_batch_size or model, or more ranks, takes less memory"
            ) from error
        at_a_time = min(micro_batch_size or rows, rows)
        way_out = "A smaller model, or grad_checkpointing of a tower, takes less memory"
        if at_a_time > 1:
            way_out = (
                f"A smaller micro_batch_size, such as {at_a_time // 2}, computes the same with less memory (not with "
                "batch norm, which needs the whole batch)"
            )
        raise RunError(f"out of memory with {at_a_time} rows at a time, of {of_all}. {way_out}") from error
