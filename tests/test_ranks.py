"""What several ranks compute is what one process computes on the whole batch, gradients included."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from multimodal import distributed
from multimodal.losses.infonce import info_nce
from multimodal.towers.batch_norm import GlobalBatchNorm2d

pytestmark = pytest.mark.slow


def _work(rank: int, ranks: int, port: int, task: Callable[..., Any], arguments: tuple[Any, ...], results: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    results[rank] = task(*arguments)
    dist.destroy_process_group()


def on_ranks(ranks: int, task: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `task` returns on each of several real processes."""
    with mp.Manager() as manager:
        results = manager.dict()
        port = 20_000 + os.getpid() % 20_000
        mp.spawn(_work, (ranks, port, task, arguments, results), nprocs=ranks)
        return [results[rank] for rank in range(ranks)]


def mine(x: Tensor) -> Tensor:
    return x.chunk(distributed.world_size())[distributed.rank()]


def _info_nce(x: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    x, y, scale = (leaf.clone().requires_grad_() for leaf in (mine(x), mine(y), scale))
    loss = info_nce(x, y, scale)
    loss.backward()
    parameter = torch.nn.Parameter(scale.detach())
    parameter.grad = scale.grad
    distributed.average_gradients([parameter])
    assert x.grad is not None
    assert y.grad is not None
    assert parameter.grad is not None
    ranks = distributed.world_size()
    return distributed.average(loss), x.grad / ranks, y.grad / ranks, parameter.grad


@pytest.mark.parametrize("ranks", [2, 4])
def test_info_nce_and_its_gradients_are_those_of_the_global_batch(ranks: int) -> None:
    torch.manual_seed(0)
    x, y = (torch.nn.functional.normalize(torch.randn(12, 5, dtype=torch.float64), dim=-1) for _ in "xy")
    scale = torch.tensor(9.0, dtype=torch.float64)
    loss, x_grad, y_grad, scale_grad = _info_nce(x, y, scale)
    found = on_ranks(ranks, _info_nce, x, y, scale)
    for rank_loss, *_, rank_scale_grad in found:
        torch.testing.assert_close(rank_loss, loss, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(rank_scale_grad, scale_grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat([one[1] for one in found]), x_grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat([one[2] for one in found]), y_grad, rtol=1e-12, atol=1e-12)


def _batch_norm(x: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    norm = GlobalBatchNorm2d(x.shape[1]).double()
    rows = mine(x).clone().requires_grad_()
    output = norm(rows)
    (output * mine(weights)).mean().backward()
    distributed.average_gradients(norm.parameters())
    assert rows.grad is not None
    assert norm.weight.grad is not None
    assert norm.running_var is not None
    return output.detach(), rows.grad / distributed.world_size(), norm.weight.grad, norm.running_var


@pytest.mark.parametrize("ranks", [2, 3])
def test_batch_norm_normalises_over_the_global_batch(ranks: int) -> None:
    torch.manual_seed(0)
    x, weights = torch.randn(2, 6, 4, 5, 5, dtype=torch.float64)
    reference = torch.nn.BatchNorm2d(4).double()
    rows = x.clone().requires_grad_()
    output = reference(rows)
    (output * weights).mean().backward()
    found = on_ranks(ranks, _batch_norm, x, weights)
    torch.testing.assert_close(torch.cat([one[0] for one in found]), output.detach())
    torch.testing.assert_close(torch.cat([one[1] for one in found]), rows.grad)
    for _, _, weight_grad, running_var in found:
        torch.testing.assert_close(weight_grad, reference.weight.grad)
        torch.testing.assert_close(running_var, reference.running_var)
