"""The laws of the sigmoid loss."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from explicit import assert_same, explicit_sigmoid, pairs, some_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.loss import SigLipLoss

from multimodal.batch import Features
from multimodal.losses.sigmoid import Sigmoid, sigmoid_loss
from multimodal.losses.softplus import sum_softplus

TARGETS: list[dict[str, Any]] = [
    {"ids": None, "same": "positive"},
    {"ids": some_ids(12), "same": "positive"},
    {"ids": some_ids(12), "same": "masked"},
]


@pytest.mark.parametrize("rows", [1, 2, 3, 17, 64])
def test_value_and_gradients_are_those_of_the_loss_of_open_clip(rows: int) -> None:
    inputs = pairs(rows)
    assert_same(sigmoid_loss(*inputs), SigLipLoss()(*inputs), inputs, 1e-12)


@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("tile", [4, 5, 12, 1024])
@pytest.mark.parametrize("target", TARGETS)
def test_value_and_gradients_are_those_of_the_explicit_matrix(target: dict[str, Any], tile: int, exchange: Any) -> None:
    inputs = pairs(12)
    ours = sigmoid_loss(*inputs, **target, tile=tile, exchange=exchange)
    assert_same(ours, explicit_sigmoid(*inputs, **target), inputs)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_value_and_gradients_are_those_of_the_explicit_matrix_for_any_shape(data: st.DataObject) -> None:
    rows, dims, tile = (data.draw(st.integers(1, largest)) for largest in (16, 9, 20))
    inputs = pairs(rows, dims, seed=data.draw(st.integers(0, 99)))
    inputs[2].data.fill_(data.draw(st.sampled_from([0.0, 1.0, 10.0, 100.0])))
    inputs[3].data.fill_(data.draw(st.sampled_from([0.0, -10.0, 50.0])))
    ids = torch.tensor(data.draw(st.lists(st.integers(-3, 3), min_size=rows, max_size=rows)))
    asked = {"ids": ids, "same": data.draw(st.sampled_from(["positive", "masked"]))}
    assert_same(sigmoid_loss(*inputs, **asked, tile=tile), explicit_sigmoid(*inputs, **asked), inputs)


@pytest.mark.parametrize("same", ["positive", "masked"])
def test_the_gradient_is_the_slope_of_the_loss(same: Any) -> None:
    assert torch.autograd.gradcheck(lambda *inputs: sigmoid_loss(*inputs, ids=some_ids(5), same=same, tile=2), pairs(5))


@pytest.mark.parametrize("wanted", [[0], [1], [2], [3], [0, 1], [0, 2], [1, 2], [1, 3], [2, 3]])
def test_only_the_gradients_that_are_wanted_are_made(wanted: list[int]) -> None:
    inputs = [z.detach() for z in pairs(7)]
    leaves = tuple(inputs[i].requires_grad_() for i in wanted)
    assert_same(sigmoid_loss(*inputs, tile=3), explicit_sigmoid(*inputs), leaves)


def test_without_gradients_the_value_is_the_same() -> None:
    inputs = pairs(7)
    with torch.no_grad():
        loss = sigmoid_loss(*inputs, tile=3)
    assert torch.equal(loss, sigmoid_loss(*inputs, tile=3))


def test_the_backward_may_be_run_again() -> None:
    inputs = pairs(9)
    loss = sigmoid_loss(*inputs, tile=4)
    first, again = (torch.autograd.grad(loss, inputs, retain_graph=True) for _ in range(2))
    for one, other, opposite in zip(first, again, torch.autograd.grad(-2 * loss, inputs), strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(opposite, -2 * one)


def test_a_row_with_everything_else_masked_costs_its_own_pair() -> None:
    x, y, scale, bias = pairs(4)
    loss = sigmoid_loss(x, y, scale, bias, ids=torch.zeros(4, dtype=torch.int64), same="masked", tile=3)
    torch.testing.assert_close(loss, -F.logsigmoid(scale * (x * y).sum(1) + bias).mean())


@pytest.mark.parametrize("scale", [0.0, 10.0, 100.0, 1000.0])
def test_equal_features_zeros_and_any_scale_give_finite_gradients(scale: float) -> None:
    x, y, multiplier, bias = pairs(20, dtype=torch.float32)
    x.data[3:9], y.data[5:15], x.data[10:] = torch.zeros(()), torch.zeros(()), x.data[10]
    multiplier.data = torch.tensor(scale)
    loss = sigmoid_loss(x, y, multiplier, bias, tile=8)
    exact = explicit_sigmoid(*(z.detach().double() for z in (x, y, multiplier, bias)))
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, (x, y, multiplier, bias)))


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_features_that_are_not_finite_give_a_loss_that_is_not(broken: float, rows: int) -> None:
    for which in (0, 1):
        inputs = [torch.full((rows, 1), 0.5), torch.full((rows, 1), 0.5)]
        inputs[which][-1] = broken
        assert not sigmoid_loss(*inputs, torch.tensor(5.0), torch.tensor(-1.0), tile=3).isfinite()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-60, 60), min_size=1, max_size=200), st.floats(-40, 0))
def test_a_sum_of_softplus_is_accurate_relative_to_itself(values: list[float], shift: float) -> None:
    z = torch.tensor([values]) + shift
    exact = F.softplus(z.double(), threshold=100).sum()
    torch.testing.assert_close(sum_softplus(z, torch.empty_like(z)).double(), exact, rtol=1e-5, atol=1e-40)


def test_small_losses_of_many_pairs_are_not_lost() -> None:
    z = torch.full((300, 300), -20.0)
    assert sum_softplus(z, torch.empty_like(z)).item() == pytest.approx(90_000 * math.log1p(math.exp(-20)), rel=1e-5)


def test_products_are_in_bf16_and_sums_in_float32_where_autocast_asks_for_it() -> None:
    x, y, scale, bias = pairs(32, 64, dtype=torch.float32)
    full = sigmoid_loss(x, y, scale, bias)
    with torch.autocast("cpu", torch.bfloat16):
        inside = sigmoid_loss(x, y, scale, bias)
    assert inside.dtype == torch.float32
    assert not torch.equal(inside, full)
    torch.testing.assert_close(inside, full, rtol=5e-3, atol=0)
    halves = [z.detach().bfloat16().requires_grad_() for z in (x, y)]
    exact = [z.detach().double().requires_grad_() for z in halves]
    found = torch.autograd.grad(sigmoid_loss(*halves, scale, bias, tile=24), halves)
    for one, other in zip(
        found, torch.autograd.grad(explicit_sigmoid(*exact, scale.double(), bias.double()), exact), strict=True
    ):
        assert one.dtype == torch.bfloat16
        assert (one.double() - other).norm() < 0.02 * other.norm()


def test_what_does_not_fit_is_refused() -> None:
    one = torch.tensor(1.0)
    with pytest.raises(ValueError, match=r"\[3, 2\] and \[4, 2\]"):
        sigmoid_loss(torch.ones(3, 2), torch.ones(4, 2), one, one)
    with pytest.raises(ValueError, match="ids"):
        sigmoid_loss(torch.ones(3, 2), torch.ones(3, 2), one, one, ids=torch.arange(4))


@pytest.mark.parametrize("duplicates", ["negative", "positive", "masked"])
@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_the_term_does_with_duplicates_as_it_is_told(duplicates: Any, exchange: Any) -> None:
    x, y, scale, bias = pairs(6)
    ids = some_ids(6)
    term = Sigmoid(pair=("audio", "text"), duplicates=duplicates, exchange=exchange)
    features = Features({"audio_features": x, "text_features": y}, scale, bias, {"caption": ids})
    asked: dict[str, Any] = {} if duplicates == "negative" else {"ids": ids, "same": duplicates}
    assert term.needs() == {"audio_features", "text_features", "logit_bias"} | ({"caption_ids"} if asked else set())
    torch.testing.assert_close(term(features), explicit_sigmoid(x, y, scale, bias, **asked))
