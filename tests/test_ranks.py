"""What several ranks compute is what one process computes on the whole batch, gradients included."""

import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from multimodal import distributed
from multimodal.batch import Batch
from multimodal.config import ConfigError, ModelSection
from multimodal.data.augment import Keep
from multimodal.losses.infonce import InfoNCE, info_nce
from multimodal.model import Model
from multimodal.step import training_step
from multimodal.towers.batch_norm import GlobalBatchNorm2d
from multimodal.towers.images import ImageTower
from multimodal.towers.resnet import ResNet
from multimodal.towers.vit import ViT

pytestmark = pytest.mark.slow


def _work(
    rank: int, ranks: int, meeting: str, task: Callable[..., Any], arguments: tuple[Any, ...], results: Any
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    results[rank] = task(*arguments)
    dist.destroy_process_group()


def on_ranks(ranks: int, task: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `task` returns on each of several real processes."""
    with mp.Manager() as manager, tempfile.TemporaryDirectory() as folder:
        results = manager.dict()
        mp.spawn(_work, (ranks, f"{folder}/meeting", task, arguments, results), nprocs=ranks)
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


IMAGE = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "bicubic", "heads": 2}
VIT = ViT(**IMAGE, image_size=32, patch_size=16, width=16, layers=1, mlp_ratio=2.0, pool="tok", patch_dropout=0.0)
RESNET = ResNet(**IMAGE, image_size=64, layers=(1, 1, 1, 1), width=4)
SECTION = ModelSection(embed_dim=8, logit_scale=10.0, max_logit_scale=100.0, learn_logit_scale=True, logit_bias=None)


def _train(tower: ImageTower, images: Tensor, micro_batch_size: int | None) -> dict[str, Tensor]:
    """Three steps of two image towers on two views of random images, in float64."""
    torch.manual_seed(0)
    towers = {name: tower.build(tower.preprocessor(list, Keep(), None), SECTION.embed_dim) for name in "xy"}
    model = Model(towers, SECTION).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    losses = {"infonce": InfoNCE(pair=("x", "y"))}
    for x, y in images:
        batch = Batch({"x": mine(x), "y": mine(y)}, torch.arange(len(mine(x))))
        context = torch.autocast("cpu", enabled=False)
        training_step(model, losses, optimizer, batch, context, 0.5, micro_batch_size)
    return model.state_dict()


@pytest.mark.parametrize(("tower", "micro_batch_size"), [(VIT, None), (VIT, 3), (RESNET, None)])
def test_training_on_two_ranks_is_training_on_one(tower: ImageTower, micro_batch_size: int | None) -> None:
    images = torch.randint(0, 256, (3, 2, 8, 3, tower.image_size, tower.image_size), dtype=torch.uint8)
    expected = _train(tower, images, None)
    for found in on_ranks(2, _train, tower, images, micro_batch_size):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9, msg=name)


def _lent_gradient(x: Tensor) -> Tensor:
    y, w = mine(x).clone().requires_grad_(), x.clone().requires_grad_()
    (distributed.gather(y) + w).sum().backward()
    assert w.grad is not None
    return w.grad


def test_gathering_leaves_the_gradient_of_others_alone() -> None:
    for grad in on_ranks(2, _lent_gradient, torch.zeros(4, 3)):
        torch.testing.assert_close(grad, torch.ones(4, 3))


def _refused() -> str:
    def refuse() -> None:
        raise ConfigError([("seed", "1 -> 2")], "way of resuming")

    try:
        distributed.on_first_rank(refuse)
    except ConfigError as error:
        return str(error)
    return ""


def test_an_error_of_the_first_rank_is_raised_on_all() -> None:
    assert on_ranks(2, _refused) == ["1 problem in the way of resuming:\n  seed: 1 -> 2"] * 2


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
