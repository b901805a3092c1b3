"""The laws of parameter groups, optimizers and schedules."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from open_clip_train.scheduler import cosine_lr
from torch import Tensor, nn

from multimodal.config import ModelSection
from multimodal.model import Model
from multimodal.optim import AdamW, Cosine, parameter_groups
from multimodal.parts import TowerModule, Tuning

SECTION = ModelSection(embed_dim=2, logit_scale=10.0, max_logit_scale=100.0, learn_logit_scale=True, logit_bias=None)
ADAMW = AdamW(lr=0.5, weight_decay=0.1, betas=(0.9, 0.98), eps=1e-6)


@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (1, 10), (7, 50), (50, 50)])
@pytest.mark.parametrize("final_lr", [0.0, 0.1, 1.0])
def test_the_rate_rises_to_the_peak_then_falls_to_the_final_rate(warmup: int, total: int, final_lr: float) -> None:
    schedule = Cosine(final_lr=final_lr)
    rates = [schedule(step, warmup, total) for step in range(total)]
    assert rates[:warmup] == sorted(set(rates[:warmup]))
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    if warmup:
        assert rates[0] == pytest.approx(1 / warmup)
        assert rates[warmup - 1] == 1
    if warmup < total:
        assert rates[warmup] == pytest.approx(1)
    assert all(0 < rate <= 1 for rate in rates)
    assert schedule(max(total, warmup + 1), warmup, total) == pytest.approx(final_lr)


def test_half_way_down_the_rate_is_half_way_between_peak_and_end() -> None:
    assert Cosine(final_lr=0.2)(60, 20, 100) == pytest.approx(0.6)


def test_the_rate_stays_at_its_end_behind_the_end() -> None:
    assert Cosine(final_lr=0.2)(1000, 20, 100) == pytest.approx(0.2)


@pytest.mark.parametrize("warmup", [0, 5])
def test_the_schedule_is_that_of_open_clip(warmup: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    theirs = cosine_lr(optimizer, 0.5, warmup, 40)
    for step in range(40):
        theirs(step)
        assert 0.5 * Cosine(final_lr=0.0)(step, warmup, 40) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-15)


class Net(TowerModule):
    """A stem, two blocks and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 4
        self.stem = nn.Conv2d(3, 4, 2)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.norm = nn.LayerNorm(4)
        self.projection = nn.Linear(4, 2, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Not called."""
        raise NotImplementedError

    def depths(self) -> list[list[nn.Parameter]]:
        first, last = (list(block.parameters()) for block in self.blocks)
        return [list(self.stem.parameters()), first, [*last, *self.norm.parameters()]]


def model() -> Model:
    return Model({"image": Net(), "text": Net()}, SECTION)


def groups(tunings: Mapping[str, Tuning]) -> dict[str, tuple[float, float]]:
    """By name of the parameter: its peak rate and decay."""
    built = model()
    built.freeze(tunings)
    found = parameter_groups(built, ADAMW, tunings)
    assert all(group["lr"] == group["peak_lr"] for group in found)
    names = {id(parameter): name for name, parameter in built.named_parameters()}
    placed = [(names[id(p)], (group["lr"], group["weight_decay"])) for group in found for p in group["params"]]
    assert len(placed) == len(dict(placed))
    return dict(placed)


def test_matrices_decay_and_gains_biases_and_scales_do_not() -> None:
    placed = groups({})
    assert set(placed) == {name for name, _ in model().named_parameters()}
    for name, parameter in model().named_parameters():
        assert placed[name] == (0.5, 0.1 if parameter.ndim >= 2 else 0.0)


def test_layer_wise_rates_are_those_of_the_worked_example() -> None:
    """Peak 0.5, decay 1/2: the projection has 0.5, the last block 0.25, the first 0.125, what precedes it 0.0625."""
    placed = groups({"image": Tuning(layer_decay=0.5), "text": Tuning(lr=0.1, weight_decay=0.01)})
    rates = {name.removeprefix("towers.image."): rate for name, (rate, _) in placed.items() if ".image." in name}
    assert rates == {
        "projection.weight": 0.5,
        "norm.weight": 0.25,
        "norm.bias": 0.25,
        "blocks.1.weight": 0.25,
        "blocks.1.bias": 0.25,
        "blocks.0.weight": 0.125,
        "blocks.0.bias": 0.125,
        "stem.weight": 0.0625,
        "stem.bias": 0.0625,
    }
    assert placed["towers.text.blocks.0.weight"] == placed["towers.text.projection.weight"] == (0.1, 0.01)
    assert placed["towers.text.blocks.0.bias"] == (0.1, 0)
    assert placed["logit_scale"] == (0.5, 0)


@pytest.mark.parametrize(
    ("tuning", "trained"),
    [
        ({"frozen": "tower"}, {"projection.weight"}),
        ({"frozen": "all"}, set()),
        ({"frozen": "all", "unfrozen_blocks": 1}, {"blocks.1.weight", "blocks.1.bias", "norm.weight", "norm.bias"}),
        (
            {"frozen_names": ("*.weight", "stem.*")},
            {"blocks.0.bias", "blocks.1.bias", "norm.bias"},
        ),
    ],
)
def test_what_is_frozen_is_in_no_group(tuning: dict[str, Any], trained: set[str]) -> None:
    placed = groups({"image": Tuning(**tuning)})
    assert {name.removeprefix("towers.image.") for name in placed if ".image." in name} == trained
    assert sum(".text." in name for name in placed) == 9


def test_a_pattern_that_names_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'net\.\*'.*stem\.weight"):
        model().freeze({"image": Tuning(frozen_names=("net.*",))})


def test_as_many_unfrozen_blocks_as_there_are_are_refused() -> None:
    with pytest.raises(ValueError, match="leaves nothing frozen of 2 blocks"):
        model().freeze({"image": Tuning(frozen="tower", unfrozen_blocks=3)})


def test_nothing_left_to_train_is_refused() -> None:
    built = Model({"image": Net(), "text": Net()}, SECTION.model_copy(update={"learn_logit_scale": False}))
    tunings = {"image": Tuning(frozen="all"), "text": Tuning(frozen="all")}
    built.freeze(tunings)
    with pytest.raises(ValueError, match="nothing is left to train"):
        parameter_groups(built, ADAMW, tunings)


def test_modules_whose_weights_are_all_frozen_stay_in_evaluation_mode() -> None:
    built = model()
    built.freeze({"image": Tuning(frozen="all", unfrozen_blocks=1)})
    built.train()
    image, text = built.towers["image"], built.towers["text"]
    assert isinstance(image, Net)
    assert image.training
    assert image.blocks[1].training
    assert not image.blocks[0].training
    assert not image.stem.training
    assert all(module.training for module in text.modules())
    built.eval()
    assert not any(module.training for module in built.modules())


def test_decay_alone_shrinks_matrices_and_leaves_the_rest() -> None:
    built = model()
    before = {name: p.detach().clone() for name, p in built.named_parameters()}
    optimizer = ADAMW.build(parameter_groups(built, ADAMW, {}))
    for parameter in built.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in built.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] * (1 - 0.5 * 0.1 * (parameter.ndim >= 2)))


def test_every_knob_of_adamw_reaches_the_optimizer() -> None:
    optimizer = AdamW(lr=0.25, weight_decay=0.5, betas=(0.5, 0.75), eps=0.125).build(
        [{"params": [nn.Parameter(torch.zeros(1))]}]
    )
    assert optimizer.defaults["lr"] == 0.25
    assert optimizer.defaults["betas"] == (0.5, 0.75)
    assert optimizer.defaults["eps"] == 0.125
    assert optimizer.defaults["fused"]


def test_the_cosine_integrates_to_half_of_the_peak() -> None:
    rates = [Cosine(final_lr=0.0)(step, 0, 1000) for step in range(1000)]
    assert math.fsum(rates) / 1000 == pytest.approx(0.5, abs=1e-3)
