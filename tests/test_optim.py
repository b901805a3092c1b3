"""The laws of parameter groups, optimizers and schedules."""

import math

import pytest
import torch
from open_clip_train.scheduler import cosine_lr
from torch import nn

from multimodal.optim import AdamW, Cosine, parameter_groups

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


def test_matrices_decay_and_gains_biases_and_scales_do_not() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.LayerNorm(4), nn.Linear(4, 2), nn.Embedding(5, 4))
    model.register_parameter("logit_scale", nn.Parameter(torch.tensor(1.0)))
    decaying, others = parameter_groups(model, 0.3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert decaying["weight_decay"] == 0.3
    assert others["weight_decay"] == 0
    assert {names[id(p)] for p in decaying["params"]} == {"0.weight", "2.weight", "3.weight"}
    assert {names[id(p)] for p in others["params"]} == {"0.bias", "1.weight", "1.bias", "2.bias", "logit_scale"}


def test_what_is_not_trained_is_in_no_group() -> None:
    model = nn.Linear(3, 2)
    model.bias.requires_grad = False
    assert [len(group["params"]) for group in parameter_groups(model, 0.1)] == [1, 0]


def test_decay_alone_shrinks_matrices_and_leaves_the_rest() -> None:
    model = nn.Linear(3, 2)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = ADAMW.build(parameter_groups(model, 0.1))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), before[0] * (1 - 0.5 * 0.1))
    assert torch.equal(model.bias, before[1])


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
