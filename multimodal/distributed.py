"""Rank, world size, gather with gradient and reductions; every function also works without a process group.

The objective of a step is the mean over ranks of each rank's loss. `gather` and `average_gradients` keep to that, so a
loss may be computed in full on every rank or only for the rank's own rows: the gradient is that of the global batch.
"""

import os
import pickle
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


def rank() -> int:
    """This process's number, from 0; also before the process group exists."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes there are, as said by the launcher (torchrun)."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def start(device: torch.device) -> None:
    """Join the other ranks, if a launcher started several."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size() > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def on_first_rank(function: Callable[[], T]) -> T:
    """The result of `function`, run on rank 0 and sent to all; its exception is raised on all."""
    if not dist.is_initialized():
        return function()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error if _travels(error) else RuntimeError(f"{type(error).__name__}: {error}")
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def _travels(error: Exception) -> bool:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return False
    return True


def total(*counts: int) -> list[int]:
    """Each count summed over ranks; the same answer on all."""
    sums = torch.tensor(counts)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return [int(count) for count in sums]


def smallest(count: int) -> int:
    """The least of all ranks' counts; the same answer on all."""
    least = torch.tensor(count)
    if dist.is_initialized():
        dist.all_reduce(least, dist.ReduceOp.MIN)
    return int(least)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)  # autograd may have lent it to others too
        dist.all_reduce(grad)
        start = dist.get_rank() * ctx.rows
        return grad[start : start + ctx.rows]


def gather(
    x: Tensor,  # [b, ...] this rank's rows, as many on every rank
) -> Tensor:  # [B, ...] all rows, in the order of the ranks
    """All ranks' rows; the gradient of a row is the sum over every rank's use of it."""
    if not dist.is_initialized():
        return x
    gathered: Tensor = _Gather.apply(x)
    return gathered


def gather_uneven(x: Tensor, counts: list[int]) -> Tensor:
    """All ranks' rows without gradient, `counts[r]` of them from rank r."""
    if not dist.is_initialized():
        return x
    padded = x.new_zeros(max(counts), *x.shape[1:])
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over ranks, in one reduction; every rank has the same ones."""
    if not dist.is_initialized():
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for grad, mean in zip(grads, torch.split(flat, [grad.numel() for grad in grads]), strict=True):
        grad.copy_(mean.view_as(grad))


def average(x: Tensor) -> Tensor:
    """The mean of a value over ranks, without gradient."""
    x = x.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x
