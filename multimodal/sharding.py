"""Weights, gradients and optimizer state in parts, one on each rank, instead of whole on all (FSDP2; ZeRO-3).

Zhao et al. 2023, "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel".
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import nn

from multimodal import distributed
from multimodal.model import Model
from multimodal.parts import TowerModule

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
"""Modules whose parts are called without them."""


def shard(model: Model, device: torch.device) -> None:
    """Leave this rank its part of every weight, on the device; before the optimizer is made, for weights are replaced.

    A block's weights are whole only while it computes, a tower's other weights while the tower does; blocks are moved
    one by one. Scales, which have no dimension to cut along, stay whole everywhere, and so do buffers.
    """
    from torch.distributed.device_mesh import init_device_mesh  # these take seconds to import
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    whole = {p for p in model.parameters() if p.ndim == 0}
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # cut along their first dimension, also those in channels_last
    cut = partial(fully_shard, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    for tower in model.towers.values():
        assert isinstance(tower, TowerModule)
        for module in [*_blocks(tower), tower.projection, tower]:
            if any(p not in whole for p in module.parameters()):
                cut(module)
    cut(model)
    model.to(device)  # what stays whole
    model({})  # the first that computes something is the root of what is gathered and reduced together


def check_blocks_are_called(tower: nn.Module) -> None:
    """ValueError if a tower leaves out whole blocks at random: ranks that call others would wait for each other."""
    for name, module in tower.named_modules():
        trained = any(p.requires_grad for p in module.parameters())  # what is frozen leaves nothing out
        if trained and getattr(module, "layerdrop", 0) > 0:
            share = module.layerdrop
            told = f"sharding=full needs every rank in every block, and {name} leaves out {share} of them at random"
            raise ValueError(f"{told} (layerdrop): sharding=none, or encoder_layerdrop 0 in its config.json")


def _blocks(tower: TowerModule) -> Iterator[nn.Module]:
    """The modules that hold most of a block's parameters, where one does."""
    for parameters in tower.depths()[1:]:
        known, count = {id(p) for p in parameters}, sum(p.numel() for p in parameters)
        found = _outermost(tower, known, count // 2)
        if found is not None:
            yield found


def _outermost(module: nn.Module, known: set[int], count: int) -> nn.Module | None:
    """The outermost module of more than `count` parameters, all of them `known`; no container, which nobody calls.

    Neither one around a single container, as that of blocks is in a network of one block.
    """
    parameters = list(module.parameters())
    if sum(p.numel() for p in parameters) <= count:
        return None
    parts = [child for child in module.children() if next(child.parameters(), None) is not None]
    own = next(module.parameters(recurse=False), None)
    container = isinstance(module, CONTAINERS) or (own is None and len(parts) == 1 and isinstance(parts[0], CONTAINERS))
    if not container and all(id(p) in known for p in parameters):
        return module
    inner = (_outermost(child, known, count) for child in module.children())
    return next((found for found in inner if found is not None), None)


def is_sharded(module: nn.Module) -> "TypeGuard[FSDPModule]":
    """Whether ranks hold parts of its weights."""
    if not distributed.started():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def reduce_after_next_backward(tower: nn.Module, reduce: bool) -> None:
    """Whether the next backward pass ends in averages over ranks, or its gradients are kept whole, to be added to."""
    if is_sharded(tower):
        tower.set_requires_gradient_sync(reduce)


@contextmanager
def gathered(tower: nn.Module) -> Iterator[None]:
    """A sharded tower's weights are whole inside, so that each rank may encode as many batches as it has."""
    modules = [module for module in tower.modules() if is_sharded(module)]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()
