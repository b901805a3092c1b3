"""The laws of InfoNCE."""

import math

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from torch import Tensor

from multimodal.batch import Features
from multimodal.losses.infonce import InfoNCE, info_nce


def pairs(rows: int, dims: int = 8, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Unit rows of two modalities and a scale, all leaves that want a gradient."""
    generator = torch.Generator().manual_seed(rows)
    x, y = (F.normalize(torch.randn(rows, dims, generator=generator, dtype=dtype), dim=-1) for _ in range(2))
    return x.requires_grad_(), y.requires_grad_(), torch.tensor(14.0, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("rows", [1, 2, 3, 17, 64])
def test_value_and_gradients_are_those_of_the_loss_of_open_clip(rows: int) -> None:
    inputs = pairs(rows)
    ours, theirs = info_nce(*inputs), ClipLoss()(*inputs)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    for mine, other in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


def test_the_loss_is_the_same_with_the_modalities_exchanged() -> None:
    x, y, scale = pairs(9)
    torch.testing.assert_close(info_nce(x, y, scale), info_nce(y, x, scale), rtol=0, atol=1e-14)


def test_the_loss_is_the_same_for_pairs_in_another_order() -> None:
    x, y, scale = pairs(9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(info_nce(x, y, scale), info_nce(x[order], y[order], scale), rtol=0, atol=1e-14)


@pytest.mark.parametrize("rows", [1, 2, 50])
def test_equal_features_cost_the_logarithm_of_the_batch(rows: int) -> None:
    x = F.normalize(torch.ones(rows, 4, dtype=torch.float64), dim=-1)
    assert info_nce(x, x, torch.tensor(14.0)).item() == pytest.approx(math.log(rows), abs=1e-12)


def test_well_separated_pairs_cost_nothing() -> None:
    x = torch.eye(6, dtype=torch.float64)
    assert info_nce(x, x, torch.tensor(100.0)).item() == pytest.approx(0, abs=1e-12)


def test_the_loss_is_computed_in_float32_under_autocast() -> None:
    x, y, scale = (z.detach() for z in pairs(32, dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        inside = info_nce(x, y, scale)
        halves = info_nce(x.bfloat16(), y.bfloat16(), scale)
    assert inside.dtype == halves.dtype == torch.float32
    assert torch.equal(inside, info_nce(x, y, scale))
    assert torch.equal(halves, info_nce(x.bfloat16().float(), y.bfloat16().float(), scale))


def test_the_term_aligns_the_pair_that_it_names() -> None:
    x, y, scale = pairs(5)
    features = Features({"audio_features": x, "text_features": y, "image_features": -x}, scale)
    term = InfoNCE(weight=2.0, pair=("audio", "text"))
    assert term.needs() == {"audio_features", "text_features"}
    assert torch.equal(term(features), info_nce(x, y, scale))
