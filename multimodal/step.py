"""One optimisation step: the whole batch at once, or micro-batches with cached gradients. The gradient is the same.

A contrastive loss needs the features of all pairs at once, but their activations need not be there at once. So with
micro-batches the towers run twice. First without gradient: features only, of the whole batch, chunk by chunk. The loss
and its gradient with respect to these features follow. Then with gradient, chunk by chunk again: each chunk's features
meet the gradient that was kept for them, and its activations are gone before the next one's.

Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (GradCache).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from multimodal import distributed
from multimodal.batch import Batch, Features
from multimodal.model import Model
from multimodal.parts import Loss


class Chunk(NamedTuple):
    """Some rows of one tower's inputs, with the random state that it meets them in."""

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
    micro_batch_size: int | None = None,  # rows that a tower keeps the activations of; None for all of them
    seed: tuple[int, int] = (0, 0),  # of the run, and the step
) -> dict[str, Tensor]:
    """Update the model by one batch; returns scalars on the device, so that nothing waits for it.

    A loss or gradient that is not finite leaves weights and optimizer as they were; "finite" is then 0.
    """
    chunks = list(_chunks(model, batch, micro_batch_size, seed))
    whole = len(chunks) == len(model.towers)
    if whole:
        features = _features(model, batch, context, chunks)
        total, terms = _objective(model, losses, batch, features)
        total.backward()  # type: ignore[no-untyped-call]
    else:
        with torch.no_grad():
            features = _features(model, batch, context, chunks)
        cached = {name: tensor.requires_grad_() for name, tensor in features.items()}
        total, terms = _objective(model, losses, batch, cached)
        total.backward()  # type: ignore[no-untyped-call]
        with _buffers_left_alone(model):
            for chunk in chunks:
                _meet_gradients(model, batch, context, chunk, cached)
    distributed.average_gradients(model.parameters())

    norms = {tower: _grad_norm(model.tower_parameters(tower)) for tower in model.towers}
    trained = [p for p in model.parameters() if p.grad is not None]
    norm = _grad_norm(trained)
    if max_grad_norm is not None:
        clip_grads_with_norm_(trained, max_grad_norm, norm)

    loss = distributed.average(total)
    finite = (loss.isfinite() & norm.isfinite()).float()
    optimizer.found_inf = 1 - finite  # type: ignore[attr-defined]  # torch's fused optimizers skip the update where it is 1
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    model.clamp_logit_scale()

    measured = {"loss": loss, "finite": finite, "logit_scale": model.logit_scale.detach().exp(), "grad_norm": norm}
    if len(terms) > 1:
        measured |= {f"loss/{name}": distributed.average(term) for name, term in terms.items()}
    return measured | {f"grad_norm/{tower}": norm for tower, norm in norms.items()}


def _chunks(model: Model, batch: Batch, micro_batch_size: int | None, seed: tuple[int, int]) -> Iterator[Chunk]:
    """One tower after the other, each in chunks; the last one may be smaller."""
    size = len(batch.indices)
    for place, tower in enumerate(model.towers):
        for start in range(0, size, micro_batch_size or size):
            rows = slice(start, min(start + (micro_batch_size or size), size))
            yield Chunk(tower, rows, _random_seed(*seed, distributed.rank(), place, start))


def _random_seed(*place: int) -> int:
    """A random state that is a function of where it is used: nothing of it needs to be saved, or carried along."""
    return int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0]) & (2**63 - 1)


def _encode(model: Model, batch: Batch, context: torch.autocast, chunk: Chunk) -> Mapping[str, Tensor]:
    """The features of a chunk by name; dropout, patch dropout and drop path are the same each time."""
    torch.manual_seed(chunk.seed)
    inputs, pooled = (
        {chunk.tower: given[chunk.tower][chunk.rows]} if chunk.tower in given else {}
        for given in (batch.inputs, batch.pooled)
    )
    with context:
        features: Mapping[str, Tensor] = model(inputs, pooled)
    return features


def _features(model: Model, batch: Batch, context: torch.autocast, chunks: list[Chunk]) -> dict[str, Tensor]:
    """The features of all rows by name."""
    parts: dict[str, list[Tensor]] = {}
    for chunk in chunks:
        for name, tensor in _encode(model, batch, context, chunk).items():
            parts.setdefault(name, []).append(tensor)
    return {name: torch.cat(tensors) if len(tensors) > 1 else tensors[0] for name, tensors in parts.items()}


def _objective(
    model: Model, losses: Mapping[str, Loss], batch: Batch, features: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the terms, and the terms by name."""
    given = Features(features, model.logit_scale.exp(), model.logit_bias, batch.ids)
    terms = {name: loss(given) for name, loss in losses.items()}
    return torch.stack([losses[name].weight * term for name, term in terms.items()]).sum(), terms


def _meet_gradients(
    model: Model, batch: Batch, context: torch.autocast, chunk: Chunk, cached: Mapping[str, Tensor]
) -> None:
    """The backward pass of a chunk, from the gradients that the loss left at its features."""
    if not any(parameter.requires_grad for parameter in model.tower_parameters(chunk.tower)):
        return
    features = _encode(model, batch, context, chunk)
    wanted = {name: tensor for name, tensor in features.items() if cached[name].grad is not None}
    torch.autograd.backward(list(wanted.values()), [cached[name].grad[chunk.rows] for name in wanted])  # type: ignore[index]


def tower_passes(model: Model, batch: Batch, context: torch.autocast, rows: int) -> None:
    """Forward and backward through every tower, one after the other, as for a micro-batch; leaves no gradients."""
    with _buffers_left_alone(model):
        for tower in model.towers:
            features = _encode(model, batch, context, Chunk(tower, slice(0, rows), seed=0))
            trained = [tensor.sum() for tensor in features.values() if tensor.requires_grad]
            if trained:
                torch.autograd.backward(trained)
        model.zero_grad(set_to_none=True)


def has_batch_norm(model: Model) -> bool:
    """Whether features depend on which rows are encoded together, as they do under a batch norm that is trained."""
    return any(module.training for module in model.train().modules() if isinstance(module, _BatchNorm))


@contextmanager
def _buffers_left_alone(model: nn.Module) -> Iterator[None]:
    """What the first pass has counted is not counted twice."""
    before = [buffer.clone() for buffer in model.buffers()]
    yield
    for buffer, value in zip(model.buffers(), before, strict=True):
        buffer.copy_(value)


def _grad_norm(parameters: list[torch.nn.Parameter]) -> Tensor:
    grads = [p.grad for p in parameters if p.grad is not None]
    return get_total_norm(grads) if grads else torch.zeros(())
