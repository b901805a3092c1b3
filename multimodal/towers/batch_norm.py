"""Batch norm whose statistics are those of the global batch, on any device."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from multimodal import distributed


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """`BatchNorm2d` that in training normalises over the images of all ranks, so that ranks change nothing.

    Equals `nn.BatchNorm2d` on the whole batch in one process, gradients included. `nn.SyncBatchNorm` does the same on
    GPUs only.
    """

    def forward(self, input: Tensor) -> Tensor:
        """From [b, C, H, W] to the same."""
        if not self.training or distributed.world_size() == 1:
            return super().forward(input)
        x = input if input.dtype == torch.float64 else input.float()
        moments = torch.stack([x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)])
        means, variances = distributed.gather(moments[None]).unbind(1)  # [ranks, C] each
        mean = means.mean(0)
        variance = variances.mean(0) + (means - mean).square().mean(0)  # Chan et al. 1979, for equal parts
        self._track(mean.detach(), variance.detach(), x.numel() // x.shape[1] * distributed.world_size())
        scale = self.weight * (variance + self.eps).rsqrt()
        shift = self.bias - mean * scale
        normalised: Tensor = x * scale[:, None, None] + shift[:, None, None]
        return normalised.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: int) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        self.num_batches_tracked += 1


def normalise_globally(network: nn.Module) -> None:
    """Replace every `BatchNorm2d` in a freshly built network."""
    for name, child in network.named_children():
        if type(child) is nn.BatchNorm2d:
            replacement = GlobalBatchNorm2d(child.num_features, child.eps, child.momentum)
            replacement.load_state_dict(child.state_dict())
            setattr(network, name, replacement)
        else:
            normalise_globally(child)


def trained_batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """By name, those that take the statistics of a batch in training: features depend on what else is in it."""
    training = model.training
    named = model.train().named_modules()
    found = {name: module for name, module in named if isinstance(module, _BatchNorm) and module.training}
    model.train(training)
    return found


def check_batch_norms(model: nn.Module) -> None:
    """ValueError where one takes the statistics of its rank's rows, which are not those of the global batch."""
    local = [
        name
        for name, module in trained_batch_norms(model).items()
        if not isinstance(module, GlobalBatchNorm2d | nn.SyncBatchNorm)
    ]
    if distributed.world_size() > 1 and local:
        raise ValueError(
            f"{local[0]} is a batch norm over the rows of one rank only; a tower whose batch norms are BatchNorm2d, or "
            "without, or one that is frozen"
        )
