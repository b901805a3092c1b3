"""One optimisation step: the whole batch at once, or micro-batches with cached gradients. The gradient is the same.

A contrastive loss needs the features of all pairs at once, but their activations need not be there at once. So with
micro-batches the towers run twice. First without gradient: features only, of the whole batch, chunk by chunk. The loss
and its gradient with respect to these features follow. Then with gradient, chunk by chunk again: each chunk's features
meet the gradient that was kept for them, and its activations are gone before the next one's. The whole batch goes back
in two parts as well, loss and towers, because their products differ in precision (`kernels`).

Where towers draw random masks, the second pass draws those of the first; chunks of another size draw others.

Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (GradCache).
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
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
    scaler: torch.amp.GradScaler | None = None,  # of precision fp16
) -> dict[str, Tensor]:
    """Update the model by one batch; returns what was measured, on the device, so that nothing waits for it.

    A loss or gradient that is not finite leaves weights and optimizer as they were; "finite" is then 0, and
    "finite_rows" [b] says whose features were. On several ranks the gradient of a feature sums what every rank's loss
    makes of it; parameters average theirs over ranks.
    With a `scaler` the loss is multiplied by "grad_scale" on the way back, and gradients are divided by it before their
    norms are taken. Where features and loss are finite and it was above 1, gradients that are not are its own doing:
    it is lowered for the next step, and "finite" stays 1.
    With micro-batches "replay_error" is how far features of the second pass are from those of the first, as a share
    of the largest: 0, unless a tower draws random numbers that no seed of torch's is for. More than `replay_tolerance`
    is wrong and leaves weights as they were, too. "updated" is 1 where they were not left as they were.
    """
    rows = len(batch.indices)
    whole = micro_batch_size is None or micro_batch_size >= rows
    chunks = list(_chunks(model, rows, rows if micro_batch_size is None else micro_batch_size, seed))
    with span("towers"), torch.set_grad_enabled(whole):
        encoded = _features(model, batch, context, chunks)
    features = {
        tower: {
            name: x.detach().requires_grad_(x.requires_grad if whole else _is_trained(model, tower))
            for name, x in named.items()
        }
        for tower, named in encoded.items()
    }
    with span("loss"):
        total, terms = objective(model, losses, batch, features)
    scalars = {"loss": total, **({f"loss/{name}": term for name, term in terms.items()} if len(terms) > 1 else {})}
    replayed = {}
    with span("backward"):
        (total if scaler is None else scaler.scale(total)).backward()  # type: ignore[no-untyped-call]
        with buffers_left_alone(model), kernels(context):
            if whole:
                _go_back((x, features[tower][k].grad) for tower, named in encoded.items() for k, x in named.items())
            else:
                errors = [_meet_gradients(model, batch, context, chunk, features[chunk.tower]) for chunk in chunks]
                replayed = {"replay_error": distributed.largest(torch.stack(errors).amax())}
    with span("gradients"):
        distributed.average_gradients(model.parameters())
        if scaler is not None:
            scaler.unscale_(optimizer)
        norms = {f"grad_norm/{tower}": _grad_norm(model.tower_parameters(tower), total) for tower in model.towers}
        trained = [p for p in model.parameters() if p.grad is not None]
        norm = _grad_norm(trained, total)
        if max_grad_norm is not None and trained:
            factor = (max_grad_norm / (norm + 1e-6)).clamp(max=1)  # as torch's clip_grad_norm_
            torch._foreach_mul_([distributed.local(p.grad) for p in trained if p.grad is not None], factor)
        finite_rows = _finite_rows(features)
        shared = [*(scalar.detach() for scalar in scalars.values()), finite_rows.all().to(total.dtype)]
        *means, share_finite = distributed.average(torch.stack(shared))

    measured = dict(zip(scalars, means, strict=True))
    finite = measured["loss"].isfinite() & norm.isfinite()
    updated = finite & (replayed["replay_error"] <= replay_tolerance(context)) if replayed else finite
    optimizer.found_inf = 1 - updated.float()  # type: ignore[attr-defined]  # torch's fused optimizers skip where it is 1
    with span("optimizer"):
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.clamp_logit_scale()
    if scaler is not None:
        scale, lowered = _follow_gradients(scaler, norm)
        mended = lowered & (scale > 1) & measured["loss"].isfinite() & (share_finite == 1)
        finite = finite | mended
        measured["grad_scale"] = scale

    measured |= {**replayed, "finite": finite.float(), "updated": updated.float(), "finite_rows": finite_rows}
    return {**measured, "logit_scale": model.logit_scale.detach().exp(), "grad_norm": norm, **norms}


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
    with context, kernels(context):
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
    grads = {k: x.grad for k, x in cached.items()}
    _go_back((x, None if (grad := grads[k]) is None else grad[chunk.rows]) for k, x in features.items())
    return torch.stack([_distance(x.detach(), cached[k].detach()[chunk.rows]) for k, x in features.items()]).amax()


def _go_back(features: Iterable[tuple[Tensor, Tensor | None]]) -> None:
    """The backward pass from features and their gradients, of those that have both a way back and a gradient."""
    wanted = [(x, grad) for x, grad in features if x.requires_grad and grad is not None]
    if wanted:
        torch.autograd.backward([x for x, _ in wanted], [grad for _, grad in wanted])


def _follow_gradients(scaler: torch.amp.GradScaler, like: Tensor) -> tuple[Tensor, Tensor]:  # [], [] bool
    """Set the scale for the next step: what it was, and whether it is lowered as a gradient was not finite."""
    one = torch.ones_like(like)
    before = scaler.scale(one)
    scaler.update()
    return before, scaler.scale(one) < before


def _distance(x: Tensor, y: Tensor) -> Tensor:
    """The largest difference of entries, as a share of the largest."""
    return (x - y).abs().amax() / y.abs().amax().clamp_min(torch.finfo(y.dtype).tiny)


def replay_tolerance(context: torch.autocast) -> float:
    """Of "replay_error": kernels that add up in another order each time round differently."""
    return 2e-2 if _is_on(context) else 1e-3


@contextmanager
def kernels(context: torch.autocast) -> Iterator[None]:
    """How towers are computed, there and back, also where checkpointed blocks are computed again.

    On a CPU attention is by plain products in bf16, where the backward pass of torch's fused kernel takes four times
    as long. On a GPU products of float32 are in TF32, if it has it: operands have 10 bits of mantissa, sums float32's.
    """
    plain = context.device == "cpu" and _is_on(context)
    flags = torch.backends.cuda.matmul  # by the older name: the newer one makes torch's compiler fail that reads it
    before = flags.allow_tf32
    flags.allow_tf32 = before or context.device == "cuda"
    try:
        with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
            yield
    finally:
        flags.allow_tf32 = before


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
