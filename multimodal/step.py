"""One optimisation step."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from multimodal import distributed
from multimodal.batch import Batch
from multimodal.model import Model
from multimodal.parts import Loss


def seed_step(seed: int, step: int) -> None:
    """Set torch's random state (dropout) to a function of (seed, step, rank): nothing of it needs to be saved."""
    state = np.random.SeedSequence((seed, step, distributed.rank())).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(state) & (2**63 - 1))


def native_precision(device: torch.device) -> str:
    """ "bf16" where the hardware multiplies it, else "fp32"."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    flags: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if flags.get("avx512_bf16") or flags.get("amx_bf16") else "fp32"


def training_step(
    model: Model,
    losses: Mapping[str, Loss],
    optimizer: torch.optim.Optimizer,
    batch: Batch,  # on the model's device
    context: torch.autocast,
    max_grad_norm: float | None,
) -> dict[str, Tensor]:
    """Update the model by one batch; returns scalars on the device, so that nothing waits for it.

    A loss or gradient that is not finite leaves weights and optimizer as they were; "finite" is then 0.
    """
    with context:
        features = model(batch.inputs, batch.pooled)
    terms = {name: loss(features) for name, loss in losses.items()}
    total = torch.stack([losses[name].weight * term for name, term in terms.items()]).sum()
    total.backward()  # type: ignore[no-untyped-call]
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


def _grad_norm(parameters: list[torch.nn.Parameter]) -> Tensor:
    grads = [p.grad for p in parameters if p.grad is not None]
    return get_total_norm(grads) if grads else torch.zeros(())
