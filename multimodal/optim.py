"""Parameter groups, optimizers, and schedules as pure functions of the step."""

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, Strict
from torch import Tensor, nn

from multimodal import distributed
from multimodal.model import Model
from multimodal.parts import Optimizer, Schedule, TowerModule, Tuning

Share = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[tuple[Share, Share], Strict(False)]

# --- groups ---------------------------------------------------------------------------------------------------------


def parameter_groups(model: Model, optimizer: Optimizer, tunings: Mapping[str, Tuning]) -> list[dict[str, Any]]:
    """What is trained, in groups of the same peak learning rate (`lr` and `peak_lr`), weight decay, and `hidden`.

    Gains, biases and scales do not decay: what has fewer than two dimensions, or "bias" in its name within the tower
    (tables of relative positions). All else does, also embeddings of positions. open_clip does the same: what it leaves
    out by "bn", "ln" and "logit_scale" has fewer than two dimensions in its networks, and any word may have "ln" in it.

    With a layer decay d, a tower's projection has the tower's rate, its last block d times that, the one before d**2
    times, and what precedes the first of n blocks d**(n + 1) times (Bao et al. 2022, BEiT).

    `hidden` are the matrices that blocks multiply by: neither embeddings nor what projects into the shared space, nor
    kernels of convolutions. Sharded weights are in groups of their own: torch takes no lists of both kinds.
    ValueError if nothing is left to train.
    """
    groups: dict[tuple[float, float, bool, bool], list[nn.Parameter]] = {}
    hidden = {id(p) for tower in model.towers.values() for p in _hidden_matrices(tower)}
    biases = {id(p) for tower in model.towers.values() for name, p in tower.named_parameters() if "bias" in name}
    seen: set[int] = set()

    def add(parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        for parameter in parameters:
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                decays = parameter.ndim >= 2 and id(parameter) not in biases
                key = lr, weight_decay if decays else 0.0, id(parameter) in hidden, distributed.is_sharded(parameter)
                groups.setdefault(key, []).append(parameter)

    for name, tuning in tunings.items():
        tower = model.towers[name]
        assert isinstance(tower, TowerModule)
        lr = optimizer.lr if tuning.lr is None else tuning.lr
        weight_decay = optimizer.weight_decay if tuning.weight_decay is None else tuning.weight_decay
        depths = tower.depths()
        for depth, parameters in enumerate(depths):
            add(parameters, lr * tuning.layer_decay ** (len(depths) - depth), weight_decay)
        add(tower.projection.parameters(), lr, weight_decay)
    add(model.parameters(), optimizer.lr, optimizer.weight_decay)
    if not groups:
        raise ValueError("every weight is frozen: nothing is left to train")
    return [
        {"params": parameters, "lr": lr, "peak_lr": lr, "weight_decay": weight_decay, "hidden": is_hidden}
        for (lr, weight_decay, is_hidden, _), parameters in groups.items()
    ]


def _hidden_matrices(tower: nn.Module) -> list[nn.Parameter]:
    """The weights of linear layers and of attention in a tower's blocks, and in a pooling that follows them.

    The last one is left out where the tower has no projection behind it: it is the one that projects.
    """
    assert isinstance(tower, TowerModule)
    multiply = {
        id(parameter)
        for module in tower.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(module, nn.Linear) or name.endswith("proj_weight")  # of nn.MultiheadAttention
    }
    found = [p for block in tower.depths()[1:] for p in block if p.ndim == 2 and id(p) in multiply]
    return found if list(tower.projection.parameters()) else found[:-1]


# --- optimizers -----------------------------------------------------------------------------------------------------


def heeding_found_inf(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The same optimizer, which now leaves weights and state as they were, to the last bit, where `found_inf` is 1.

    For those that do not do so by themselves, as torch's fused ones do. State that the first step makes is zeros where
    that step is left out. Takes a copy of weights and state during the step; nothing waits for the device, as long as
    all state is in tensors there.
    """
    before: dict[tuple[int, str], Tensor] = {}

    def tensors() -> dict[tuple[int, str], Tensor]:
        trained = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        named = {(id(p), name): state for p in trained for name, state in optimizer.state[p].items()}
        named |= {(id(p), ""): p for p in trained}
        return {key: distributed.local(tensor) for key, tensor in named.items()}

    def remember(*_: Any) -> None:
        if getattr(optimizer, "found_inf", None) is not None:
            before.update({key: tensor.detach().clone() for key, tensor in tensors().items()})

    @torch.no_grad()
    def restore(*_: Any) -> None:
        found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
        if found_inf is not None:
            left_out = found_inf.bool()
            for key, tensor in tensors().items():
                torch.where(left_out, before.get(key, tensor.new_zeros(())), tensor, out=tensor)
            before.clear()

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(restore)
    return optimizer


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019), in torch's fused form."""

    betas: Betas
    """Decay of the running means of the gradient and of its square."""
    eps: float = Field(gt=0)
    """Added to the root of the second mean."""

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)


# --- schedules ------------------------------------------------------------------------------------------------------


class _WarmedUp(Schedule):
    """Linear warm-up to the peak, then what `after` says, which begins there."""

    def __call__(self, step: int, warmup_steps: int, total_steps: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return self.after(step, warmup_steps, total_steps)

    @abstractmethod
    def after(self, step: int, warmup_steps: int, total_steps: int) -> float:
        """The factor for a `step` that is not of the warm-up."""


class Cosine(_WarmedUp):
    """Linear warm-up, then half a cosine down to `final_lr` at the end of the run."""

    final_lr: float = Field(ge=0, le=1)
    """Where the rate ends, as a share of the peak."""

    def after(self, step: int, warmup_steps: int, total_steps: int) -> float:
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return self.final_lr + (1 - self.final_lr) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


class Constant(_WarmedUp):
    """Linear warm-up, then the peak to the end: what a run computes does not depend on how long it will be."""

    def after(self, step: int, warmup_steps: int, total_steps: int) -> float:
        return 1.0


class InverseSqrt(_WarmedUp):
    """Linear warm-up, then a fall with the square root of the step (Zhai et al. 2022), which does not know the end.

    With a `timescale` as long as the warm-up it is that of the Transformer (Vaswani et al. 2017).
    """

    timescale: int = Field(gt=0)
    """Steps: so many after the warm-up the rate is 1 / sqrt(2) of the peak, and after three times as many a half."""

    def after(self, step: int, warmup_steps: int, total_steps: int) -> float:
        return math.sqrt(self.timescale / (self.timescale + step - warmup_steps))


class WarmupStableDecay(_WarmedUp):
    """Linear warm-up, then the peak, then a decay at the end of the run (Hägele et al. 2024).

    A run that is made longer before its decay begins is the one that had been as long from the start.
    """

    decay: float = Field(gt=0, le=1)
    """The share of the run in which the rate falls, at its end; of all steps, but it begins after the warm-up."""
    form: Literal["linear", "1-sqrt"]
    """How it falls: in a line, or by 1 - sqrt(x), steeply at first."""
    final_lr: float = Field(ge=0, le=1)
    """Where the rate ends, as a share of the peak."""

    def after(self, step: int, warmup_steps: int, total_steps: int) -> float:
        begin = max(warmup_steps, total_steps * (1 - self.decay))
        progress = min(1.0, max(0.0, step - begin) / max(1, total_steps - begin))
        fallen = progress if self.form == "linear" else math.sqrt(progress)
        return 1 - (1 - self.final_lr) * fallen
