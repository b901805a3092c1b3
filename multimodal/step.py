"""One optimisation step: the whole batch at once, or micro-batches with cached gradients. The gradient is the same.

A contrastive loss needs the features of all pairs at once, but their activations need not be there at once. So with
micro-batches the towers run twice. First without gradient: features only, of the whole batch, chunk by chunk. The loss
and its gradient with respect to these features follow. Then with gradient, chunk by chunk again: each chunk's features
meet the gradient that was kept for them, and its activations are gone before the next one's.

Where towers draw random masks, the second pass draws those of the first; chunks of another size draw others.

Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (GradCache).
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import get_total_norm

from multimodal import distributed
from multimodal.batch import Batch, Features
from multimodal.model import Model
from multimodal.parts import Loss
from multimodal.profiling import span
from multimodal.sharding import reduce_after_next_backward


class Chunk(NamedTuple):
    """Some rows of one tower's inputs, and the seed of the random masks that they get."""

    tower: str
    rows: slice
    seed: int


def training_step(
    model: Model,
    losses: Mapping[str, Loss],
    optimizer: torch.optim.Optimizer,
    batch: Batch,  # on the model's device
    context: torch.autocast,  # of the towers
    max_grad_norm: float | None,
    micro_batch_size: int | None,  # rows that a tower keeps the activations of; None for all of them
    seed: tuple[int, int],  # of the run, and the step
) -> dict[str, Tensor]:
    """Update the model by one batch; returns what was measured, on the device, so that nothing waits for it.

    A loss or gradient that is not finite leaves weights and optimizer as they were; "finite" is then 0, and
    "finite_rows" [b] says whose features were. On several ranks the gradient of a feature sums what every rank's loss
    makes of it; parameters average theirs over ranks.
    With micro-batches "replay_error" is how far features of the second pass are from those of the first, as a share
    of the largest: 0, unless a tower draws random numbers that no seed of torch's is for. More than `replay_tolerance`
    is wrong and leaves weights as they were, too.
    """
    rows = len(batch.indices)
    whole = micro_batch_size is None or micro_batch_size >= rows
    chunks = list(_chunks(model, rows, rows if micro_batch_size is None else micro_batch_size, seed))
    with span("towers"), torch.set_grad_enabled(whole):
        features = _features(model, batch, context, chunks)
    if not whole:
        for tower, tensors in features.items():
            for tensor in tensors.values():
                tensor.requires_grad_(_is_trained(model, tower))
    with span("loss"):
        total, terms = objective(model, losses, batch, features)
    scalars = {"loss": total, **({f"loss/{name}": term for name, term in terms.items()} if len(terms) > 1 else {})}
    replayed = {}
    with span("backward"), buffers_left_alone(model), attention(context):
        total.backward()  # type: ignore[no-untyped-call]
        if not whole:
            errors = [_meet_gradients(model, batch, context, chunk, features[chunk.tower]) for chunk in chunks]
            replayed = {"replay_error": distributed.largest(torch.stack(errors).amax())}
    with span("gradients"):
        distributed.average_gradients(model.parameters())
        norms = {f"grad_norm/{tower}": _grad_norm(model.tower_parameters(tower), total) for tower in model.towers}
        trained = [p for p in model.parameters() if p.grad is not None]
        norm = _grad_norm(trained, total)
        if max_grad_norm is not None and trained:
            factor = (max_grad_norm / (norm + 1e-6)).clamp(max=1)  # as torch's clip_grad_norm_
            torch._foreach_mul_([distributed.local(p.grad) for p in trained if p.grad is not None], factor)
        means = distributed.average(torch.stack([scalar.detach() for scalar in scalars.values()]))

    measured = dict(zip(scalars, means, strict=True))
    loss = measured["loss"]
    finite = (loss.isfinite() & norm.isfinite()).float()
    sound = finite * (replayed["replay_error"] <= replay_tolerance(context)).float() if replayed else finite
    optimizer.found_inf = 1 - sound  # type: ignore[attr-defined]  # torch's fused optimizers skip the update where it is 1
    with span("optimizer"):
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.clamp_logit_scale()

    scale = model.logit_scale.detach().exp()
    told = {**measured, **replayed, "finite": finite, "finite_rows": _finite_rows(features)}
    return {**told, "logit_scale": scale, "grad_norm": norm, **norms}


def _chunks(model: Model, rows: int, size: int, seed: tuple[int, int]) -> Iterator[Chunk]:
    """One tower after the other, each in chunks; the last one may be smaller."""
    for place, tower in enumerate(model.towers):
        for start in range(0, rows, size):
            chunk_seed = _random_seed(*seed, distributed.rank(), place, start)
            yield Chunk(tower, slice(start, min(start + size, rows)), chunk_seed)


def _random_seed(*place: int) -> int:
    """A random state that is a function of where it is used: nothing of it needs to be saved, or carried along."""
    return int(np.random.SeedSequence(place).generate_state(1, np.uint32)[0])  # all that torch takes on a CPU


def _is_trained(model: Model, tower: str) -> bool:
    return any(parameter.requires_grad for parameter in model.tower_parameters(tower))


def encode_chunk(model: Model, batch: Batch, context: torch.autocast, chunk: Chunk) -> Mapping[str, Tensor]:
    """The features of a chunk by name; dropout, patch dropout and drop path are the same each time."""
    torch.manual_seed(chunk.seed)
    inputs, pooled, lengths = (
        {chunk.tower: given[chunk.tower][chunk.rows]} if chunk.tower in given else {}
        for given in (batch.inputs, batch.pooled, batch.lengths)
    )
    with context, attention(context):
        features: Mapping[str, Tensor] = model(inputs, pooled, lengths)
    return features


def _features(model: Model, batch: Batch, context: torch.autocast, chunks: list[Chunk]) -> dict[str, dict[str, Tensor]]:
    """By tower, the features of all rows by name."""
    parts: dict[str, dict[str, list[Tensor]]] = {}
    for chunk in chunks:
        for name, tensor in encode_chunk(model, batch, context, chunk).items():
            parts.setdefault(chunk.tower, {}).setdefault(name, []).append(tensor)
    return {
        tower: {name: torch.cat(tensors) if len(tensors) > 1 else tensors[0] for name, tensors in named.items()}
        for tower, named in parts.items()
    }


def _finite_rows(features: Mapping[str, Mapping[str, Tensor]]) -> Tensor:  # [b] bool
    rows = [x.detach().isfinite().flatten(1).all(1) for named in features.values() for x in named.values()]
    return torch.stack(rows).all(0)


def objective(
    model: Model, losses: Mapping[str, Loss], batch: Batch, features: Mapping[str, Mapping[str, Tensor]]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the terms, and the terms by name."""
    tensors = {name: tensor for named in features.values() for name, tensor in named.items()}
    given = Features(tensors, model.logit_scale.exp(), model.logit_bias, batch.ids)
    terms = {name: loss(given) for name, loss in losses.items()}
    return torch.stack([losses[name].weight * term for name, term in terms.items()]).sum(), terms


def _meet_gradients(
    model: Model, batch: Batch, context: torch.autocast, chunk: Chunk, cached: Mapping[str, Tensor]
) -> Tensor:  # []
    """The backward pass of a chunk from the gradients of its tower's `cached` features; how far its own are off."""
    if all(tensor.grad is None for tensor in cached.values()):
        return model.logit_scale.new_zeros(())  # the tower is frozen, or no loss reads it
    reduce_after_next_backward(model.towers[chunk.tower], chunk.rows.stop == len(batch.indices))
    features = encode_chunk(model, batch, context, chunk)
    wanted = {k: x for k, x in features.items() if x.requires_grad and cached[k].grad is not None}
    if wanted:
        torch.autograd.backward(list(wanted.values()), [cached[k].grad[chunk.rows] for k in wanted])  # type: ignore[index]
    return torch.stack([_distance(x.detach(), cached[k].detach()[chunk.rows]) for k, x in features.items()]).amax()


def _distance(x: Tensor, y: Tensor) -> Tensor:
    """The largest difference of entries, as a share of the largest."""
    return (x - y).abs().amax() / y.abs().amax().clamp_min(torch.finfo(y.dtype).tiny)


def replay_tolerance(context: torch.autocast) -> float:
    """Of "replay_error": kernels that add up in another order each time round differently."""
    return 2e-2 if _is_on(context) else 1e-3


def attention(context: torch.autocast) -> AbstractContextManager[None]:
    """How attention is computed, also where checkpointed blocks compute it again.

    By plain products in bf16 on a CPU, where the backward pass of torch's fused kernel takes four times as long.
    """
    plain = context.device == "cpu" and _is_on(context)
    return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()


def _is_on(context: torch.autocast) -> bool:
    with copy(context):  # one that is entered twice does not find its way back
        return torch.is_autocast_enabled(context.device)


@contextmanager
def buffers_left_alone(model: nn.Module) -> Iterator[None]:
    """What is computed a second time inside (chunks, checkpointed blocks) does not count twice in statistics."""
    before = [buffer.clone() for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in zip(model.buffers(), before, strict=True):
            buffer.copy_(value)


def _grad_norm(parameters: list[torch.nn.Parameter], total: Tensor) -> Tensor:
    grads = [p.grad for p in parameters if p.grad is not None]
    parts = [distributed.local(grad) for grad in grads if distributed.is_sharded(grad)]
    others = [grad for grad in grads if not distributed.is_sharded(grad)]
    norm = get_total_norm(others) if others else total.new_zeros(())
    if parts:
        norms = distributed.gather(get_total_norm(parts)[None])
        norm = torch.linalg.vector_norm(torch.cat([norms, norm[None]]))
    return norm
