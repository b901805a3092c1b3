"""The laws of the running mean of the weights."""

from typing import Any

import pytest
import torch
from test_step import small_model
from torch import Tensor, nn

from multimodal.ema import Ema
from multimodal.model import Model

ONE, ZERO = torch.ones(()), torch.zeros(())


def walk(model: Model, seed: int) -> None:
    """Move the weights somewhere."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator)


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.items()}


def assert_same(ours: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    assert ours.keys() == others.keys()
    assert all(torch.equal(value, others[name]) for name, value in ours.items())


def test_the_mean_starts_from_the_weights_and_moves_by_its_share() -> None:
    model = small_model()
    ema = Ema(model, 0.75)
    assert_same(ema.state_dicts()["ema"], model.state_dict())
    wanted = copied(model.state_dict())
    for seed in range(4):
        walk(model, seed)
        ema.update(ONE)
        wanted = {name: 0.75 * mean + 0.25 * model.state_dict()[name] for name, mean in wanted.items()}
        for name, mean in ema.state_dicts()["ema"].items():
            torch.testing.assert_close(mean, wanted[name])


def test_a_step_that_is_left_out_leaves_the_mean() -> None:
    model = small_model()
    ema = Ema(model, 0.75)
    walk(model, 0)
    ema.update(ONE)
    before = copied(ema.state_dicts()["ema"])
    ema.update(ZERO)
    assert_same(ema.state_dicts()["ema"], before)


def test_the_mean_is_in_the_model_inside_and_the_weights_are_again_behind_it() -> None:
    model = small_model()
    ema = Ema(model, 0.75)
    walk(model, 0)
    ema.update(ONE)
    raw, mean = (copied(ema.state_dicts()[kind]) for kind in ema.kinds)
    parameters = list(model.parameters())
    with ema.in_place("raw"):
        assert_same(model.state_dict(), raw)
    with ema.in_place("ema"):
        assert_same(model.state_dict(), mean)
    assert_same(model.state_dict(), raw)
    with pytest.raises(ZeroDivisionError), ema.in_place("ema"):
        raise ZeroDivisionError
    assert_same(model.state_dict(), raw)
    assert all(now is before for now, before in zip(model.parameters(), parameters, strict=True))
    assert_same(ema.state_dicts()["ema"], mean)


def test_without_a_decay_there_is_no_mean_and_no_memory_is_taken() -> None:
    model = small_model()
    ema = Ema(model, None)
    ema.update(ONE)
    assert (ema.kinds, ema.means) == (("raw",), [])
    assert ema.state_dicts().keys() == {"raw"}


def test_what_is_frozen_and_statistics_are_the_model_s_own() -> None:
    model = small_model()
    for tower in model.towers.values():
        norm: Any = nn.BatchNorm1d(4).double()
        tower.add_module("norm", norm)
    model.towers["image"].requires_grad_(False)
    ema = Ema(model, 0.75)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(ema.means) == len(trained) < len(list(model.parameters()))
    walk(model, 0)
    for tower in model.towers.values():
        tower.norm(torch.randn(8, 4, dtype=torch.float64))  # type: ignore[operator]
    ema.update(ONE)
    states = ema.state_dicts()
    for name, mean in states["ema"].items():
        same = name.startswith("towers.image") or "running" in name or "num_batches" in name
        assert torch.equal(mean, states["raw"][name]) == same, name
