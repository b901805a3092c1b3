"""Rank, world size, gather with gradient and reductions; every function also works without a process group.

The objective of a step is the mean over ranks of each rank's loss. `gather` and `average_gradients` keep to that, so a
loss may be computed in full on every rank or only for the rank's own rows: the gradient is that of the global batch.
"""

import os
import pickle
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import compress
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

T = TypeVar("T")

BUCKET = 32 * 2**20
"""Bytes of gradients that are reduced together: few messages, and no second copy of all of them."""
PRETENDED = "fake"
"""Torch's backend of ranks that are not there; what comes from them has shapes, and no meaning."""
TIMEOUT = 1800.0
"""Seconds that a rank waits for the others."""
LAST_WORDS = 10.0
"""Seconds within which ranks that wait for a lost one all notice it, one by the other."""


def rank() -> int:
    """This process's number, from 0; also before the process group exists."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes there are, as said by the launcher (torchrun)."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def start(device: torch.device, timeout: float = TIMEOUT) -> None:
    """Join the other ranks, if a launcher started several."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size() > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))


def started() -> bool:
    """Whether there are other ranks, and this one has joined them."""
    return dist.is_initialized()


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def pretended(ranks: int) -> Iterator[None]:
    """Be rank 0 of so many, alone: to see what shapes and how much memory a step has there."""
    if ranks == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group(PRETENDED, store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def lost_ranks(error: Exception) -> str | None:
    """Tell the other ranks why this one ends; if it is because one of them is lost, which one it was.

    Nothing is sent while all is well: a rank that ends leaves a word in the store that the group met in, and one that
    has left none was killed, or hangs.
    """
    if not dist.is_initialized():
        return None
    waited = "gloo/" in str(error) or isinstance(error, dist.DistBackendError)
    store = dist.distributed_c10d._get_default_store()
    store.set_timeout(timedelta(seconds=LAST_WORDS))
    words = [f"last words of {number}" for number in range(world_size())]
    try:
        store.set(words[rank()], "" if waited else f"{type(error).__name__}: {error}")
        if not waited:
            return None
        patience = time.monotonic() + LAST_WORDS
        while time.monotonic() < patience and not store.check(words):
            time.sleep(0.1)
        said = {number: store.get(key).decode() for number, key in enumerate(words) if store.check([key])}
    except dist.DistError:
        return "the rank that the others meet at (rank 0, or the launcher) was killed or hangs" if waited else None
    silent = [f"rank {number} was killed or hangs" for number in range(world_size()) if number not in said]
    failed = [f"rank {number} ended with {text}" for number, text in said.items() if text]
    return "; ".join(failed or silent) or None


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


_LONGEST = 512


def agree(statement: str, problem: str = "") -> None:
    """ValueError on all ranks, where one of them has a `problem` or they do not all make the same `statement`.

    For before a collective that would hang, or mix up rows, if ranks came to it with different tensors. The texts
    travel between the processors: nothing waits for the device. A process group that somebody else has started needs a
    backend for them, such as "cpu:gloo,cuda:nccl".
    """
    if dist.is_initialized() and dist.get_backend() != PRETENDED:
        text = f"{'!' if problem else ' '}{problem or statement}".encode()[:_LONGEST]
        texts = [torch.zeros(_LONGEST, dtype=torch.uint8) for _ in range(dist.get_world_size())]
        dist.all_gather(texts, torch.tensor(list(text.ljust(_LONGEST, b"\0")), dtype=torch.uint8))
        said = [bytes(text.tolist()).rstrip(b"\0").decode(errors="ignore") for text in texts]
        if not problem and len(set(said)) > 1:
            ranks = {text: said.index(text) for text in said}  # the first that says so; there may be thousands
            refused = [f"rank {i}: {text[1:]}" for text, i in ranks.items() if text.startswith("!")]
            problem = "; ".join(refused or [f"rank {i} has {text[1:]}" for text, i in ranks.items()])
            problem = problem if refused else f"the ranks differ where they must not: {problem}"
    if problem:
        raise ValueError(problem)


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


def own_rows(x: Tensor) -> slice:
    """Where this rank's rows are among those that `gather` returns."""
    number = dist.get_rank() if dist.is_initialized() else 0
    return slice(number * len(x), (number + 1) * len(x))


def gather_uneven(x: Tensor, counts: list[int]) -> Tensor:
    """All ranks' rows without gradient, `counts[r]` of them from rank r."""
    if not dist.is_initialized():
        return x
    padded = x.new_zeros(max(counts), *x.shape[1:])
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        peaks = x.clone()
        dist.all_reduce(peaks, dist.ReduceOp.MAX)
        peaks.clamp_(min=torch.finfo(x.dtype).min)  # where all are -inf
        sums = (x - peaks).exp_()
        dist.all_reduce(sums)
        result = peaks + sums.log_()
        ctx.save_for_backward(x, result)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, result = ctx.saved_tensors
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        weights: Tensor = (x - result.masked_fill(result == -torch.inf, 0)).exp_()
        return weights.mul_(grad)


def logsumexp(
    x: Tensor,  # [...] this rank's part of each sum, of one shape on all ranks
) -> Tensor:  # [...]
    """Over ranks, for every element; the gradient is the sum over every rank's use of it. -inf adds nothing."""
    if not dist.is_initialized():
        return x
    total: Tensor = _LogSumExp.apply(x)
    return total


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return average(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return average(grad)


def mean(x: Tensor) -> Tensor:
    """The mean of a value over ranks, with gradient: a mean of each rank's means over as many rows is the whole one."""
    if not dist.is_initialized():
        return x
    result: Tensor = _Mean.apply(x)
    return result


def ring(
    travelling: list[Tensor],  # of one shape on all ranks
    collecting: Tensor | None,  # likewise; the reader adds to it in place
) -> Iterator[tuple[list[Tensor], Tensor | None]]:
    """Every rank's tensors in turn, beginning with one's own, and what they collect.

    A rank holds one visitor at a time. What was collected for a rank's tensors on the way is in its own `collecting`
    when the iteration has ended; all ranks must iterate to the end.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    collected = collecting
    for hop in range(ranks):
        yield travelling, collected
        if ranks > 1:
            if hop < ranks - 1:
                travelling = _pass_on(travelling)
            if collected is not None:
                (collected,) = _pass_on([collected])
    if collecting is not None and collected is not None and collected is not collecting:
        collecting.copy_(collected)


def _pass_on(tensors: list[Tensor]) -> list[Tensor]:
    """What the rank before has, in exchange for ours, which the rank behind gets."""
    before, behind = (rank() - 1) % dist.get_world_size(), (rank() + 1) % dist.get_world_size()
    received = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]
    sends = [dist.P2POp(dist.isend, tensor.contiguous(), behind, tag=i) for i, tensor in enumerate(tensors)]
    receives = [dist.P2POp(dist.irecv, tensor, before, tag=i) for i, tensor in enumerate(received)]
    for work in dist.batch_isend_irecv([*sends, *receives]):
        work.wait()
    return received


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over ranks, many in one reduction; 0 is that of a rank without.

    Those of sharded parameters are left: they are means already.
    """
    if not dist.is_initialized():
        return
    trained = [p for p in parameters if p.requires_grad and not is_sharded(p)]
    grads = []
    for p in compress(trained, _anywhere([p.grad is not None for p in trained])):
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        grads.append(p.grad)
    for bucket in _buckets(grads):
        flat = torch.cat([grad.flatten() for grad in bucket])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for grad, mean in zip(bucket, torch.split(flat, [grad.numel() for grad in bucket]), strict=True):
            grad.copy_(mean.view_as(grad))


def _anywhere(present: list[bool]) -> list[bool]:
    """What one rank has at least: layers may be left out at random, on one and not on another."""
    if dist.get_backend() == PRETENDED:
        return present
    found = torch.tensor(present)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return [bool(one) for one in found]


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype, of no more than BUCKET bytes unless it is one alone."""
    bucket: list[Tensor] = []
    room = 0
    for tensor in tensors:
        room -= tensor.nbytes
        if bucket and (room < 0 or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        if not bucket:
            room = BUCKET - tensor.nbytes
        bucket.append(tensor)
    if bucket:
        yield bucket


def largest(x: Tensor) -> Tensor:
    """The greatest of a value on all ranks, without gradient."""
    x = x.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


# --- tensors of which each rank has a part ---------------------------------------------------------------------------


def is_sharded(x: Tensor) -> "TypeGuard[DTensor]":
    """Whether ranks hold parts of it."""
    if not dist.is_initialized():
        return False
    from torch.distributed.tensor import DTensor  # which takes seconds to import

    return isinstance(x, DTensor)


def local(x: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, in the same memory; any other as it is."""
    return x.to_local().detach() if is_sharded(x) else x


def whole(x: Tensor) -> Tensor:
    """All of a sharded tensor, which all ranks must ask for; any other as it is."""
    return x.full_tensor().detach() if is_sharded(x) else x


def placed_as(
    like: Tensor,
    x: Tensor,  # whole, and the same on all ranks
) -> Tensor:
    """The tensor, sharded as `like` is; nothing is sent."""
    if not is_sharded(like):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)


def average(x: Tensor) -> Tensor:
    """The mean of a value over ranks, without gradient."""
    x = x.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x
