"""The laws of InfoNCE."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from explicit import assert_same, explicit_info_nce, pairs, some_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.loss import ClipLoss
from torch import Tensor

from multimodal.batch import Features
from multimodal.losses import infonce
from multimodal.losses.infonce import InfoNCE, info_nce

TARGETS: list[dict[str, Any]] = [
    {"label_smoothing": smoothing, "ids": grouped, "same": same}
    for smoothing, grouped, same in itertools.product((0.0, 0.1), (False, True), ("positive", "masked"))
    if grouped or same == "positive"
]


@pytest.mark.parametrize("rows", [1, 2, 3, 17, 64])
def test_value_and_gradients_are_those_of_the_loss_of_open_clip(rows: int) -> None:
    inputs = pairs(rows)[:3]
    ours = info_nce(*inputs)
    assert ours.dtype == torch.float64
    assert_same(ours, ClipLoss()(*inputs), inputs, 1e-12)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("tile", [4, 5, 12, 1024])
@pytest.mark.parametrize("target", TARGETS)
def test_value_and_gradients_are_those_of_the_explicit_matrix(target: dict[str, Any], tile: int, keep: bool) -> None:
    inputs = pairs(12)[:3]
    asked = target | {"ids": some_ids(12) if target["ids"] else None}
    assert_same(info_nce(*inputs, **asked, tile=tile, keep_logits=keep), explicit_info_nce(*inputs, **asked), inputs)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_value_and_gradients_are_those_of_the_explicit_matrix_for_any_shape(data: st.DataObject) -> None:
    rows, dims, tile = (data.draw(st.integers(1, largest)) for largest in (24, 9, 30))
    inputs = pairs(rows, dims, seed=data.draw(st.integers(0, 99)))[:3]
    inputs[2].data.fill_(data.draw(st.sampled_from([0.0, 1.0, 14.0, 100.0])))
    asked = {
        "label_smoothing": data.draw(st.sampled_from([0.0, 0.05, 0.5])),
        "ids": torch.tensor(data.draw(st.lists(st.integers(-3, 3), min_size=rows, max_size=rows))),
        "same": data.draw(st.sampled_from(["positive", "masked"])),
    }
    ours = info_nce(*inputs, **asked, tile=tile, keep_logits=data.draw(st.booleans()))
    assert_same(ours, explicit_info_nce(*inputs, **asked), inputs)


@pytest.mark.parametrize("target", TARGETS)
def test_the_gradient_is_the_slope_of_the_loss(target: dict[str, Any]) -> None:
    asked = target | {"ids": some_ids(5) if target["ids"] else None}
    assert torch.autograd.gradcheck(lambda *inputs: info_nce(*inputs, **asked, tile=2, keep_logits=False), pairs(5)[:3])


@pytest.mark.parametrize("wanted", [[0], [1], [2], [0, 1], [0, 2], [1, 2]])
def test_only_the_gradients_that_are_wanted_are_made(wanted: list[int]) -> None:
    inputs = [z.detach() for z in pairs(7)[:3]]
    leaves = tuple(inputs[i].requires_grad_() for i in wanted)
    assert_same(info_nce(*inputs, tile=3, keep_logits=False), explicit_info_nce(*inputs), leaves)


def test_the_backward_may_be_run_again() -> None:
    inputs = pairs(9)[:3]
    for keep in (False, True):
        loss = info_nce(*inputs, tile=4, keep_logits=keep)
        first, again = (torch.autograd.grad(loss, inputs, retain_graph=True) for _ in range(2))
        negative = torch.autograd.grad(-2 * loss, inputs)
        for one, other, opposite in zip(first, again, negative, strict=True):
            assert torch.equal(one, other)
            torch.testing.assert_close(opposite, -2 * one)


def test_kept_logits_change_nothing_and_are_chosen_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, scale, _ = pairs(40, dtype=torch.float32)
    saved: list[int] = []

    def gradients(**asked: Any) -> list[Tensor]:
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda z: saved.append(z.numel()) or z, lambda z: z):
            loss = info_nce(x, y, scale, tile=16, **asked)
        return [loss, *torch.autograd.grad(loss, (x, y, scale))]

    by_size, kept_by_size = gradients(), max(saved) >= 40 * 40
    monkeypatch.setattr(infonce, "KEPT_LOGITS", 40 * 40 - 1)
    larger, kept_larger = gradients(), max(saved) >= 40 * 40
    assert (kept_by_size, kept_larger) == (True, False)
    for one, other in zip(by_size, larger, strict=True):
        assert torch.equal(one, other)


def test_the_loss_is_the_same_with_the_modalities_exchanged() -> None:
    x, y, scale, _ = pairs(9)
    torch.testing.assert_close(info_nce(x, y, scale), info_nce(y, x, scale), rtol=0, atol=1e-14)


def test_the_loss_is_the_same_for_pairs_in_another_order() -> None:
    x, y, scale, _ = pairs(9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(info_nce(x, y, scale), info_nce(x[order], y[order], scale), rtol=0, atol=1e-14)


@pytest.mark.parametrize("same", ["positive", "masked"])
def test_ids_that_are_all_different_change_nothing(same: Any) -> None:
    x, y, scale, _ = pairs(9, dtype=torch.float32)
    ids = torch.randperm(9) * 10**15
    for smoothing in (0.0, 0.1):
        plain = info_nce(x, y, scale, label_smoothing=smoothing)
        torch.testing.assert_close(info_nce(x, y, scale, label_smoothing=smoothing, ids=ids, same=same), plain)


def test_a_row_with_everything_else_masked_costs_nothing() -> None:
    inputs = pairs(4)[:3]
    for smoothing in (0.0, 0.1):
        loss = info_nce(*inputs, label_smoothing=smoothing, ids=torch.zeros(4, dtype=torch.int64), same="masked")
        assert loss.item() == 0
        for grad in torch.autograd.grad(loss, inputs):
            assert grad.abs().max() < 1e-15


@pytest.mark.parametrize("rows", [1, 2, 50])
@pytest.mark.parametrize("scale", [14.0, 100.0, 1000.0])
def test_equal_features_cost_the_logarithm_of_the_batch(rows: int, scale: float) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        x = F.normalize(torch.ones(rows, 4, dtype=dtype), dim=-1)
        loss = info_nce(x, x, torch.tensor(scale), tile=16)
        assert loss.item() == pytest.approx(math.log(rows), abs=tolerance)


def test_well_separated_pairs_cost_nothing() -> None:
    x = torch.eye(6, dtype=torch.float64)
    assert info_nce(x, x, torch.tensor(100.0)).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("scale", [0.0, 100.0, 1000.0])
def test_features_of_zero_and_any_scale_give_finite_gradients(scale: float) -> None:
    x, y, multiplier, _ = pairs(20, dtype=torch.float32)
    x.data[3:9], y.data[5:15], multiplier.data = torch.zeros(()), torch.zeros(()), torch.tensor(scale)
    loss = info_nce(x, y, multiplier, tile=8)
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, (x, y, multiplier)))


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_features_that_are_not_finite_give_a_loss_that_is_not(broken: float, rows: int) -> None:
    for which in (0, 1):
        inputs = [torch.full((rows, 1), 0.5), torch.full((rows, 1), 0.5)]
        inputs[which][-1] = broken
        assert not info_nce(*inputs, torch.tensor(5.0), tile=3).isfinite()


def test_small_losses_have_gradients_many_times_as_accurate_as_those_of_the_difference() -> None:
    generator = torch.Generator().manual_seed(0)
    x = F.normalize(torch.randn(256, 64, generator=generator, dtype=torch.float64), dim=-1)
    y = F.normalize(x + 0.02 * torch.randn(256, 64, generator=generator, dtype=torch.float64), dim=-1)
    exact = [x.requires_grad_(), y.requires_grad_(), torch.tensor(15.0, dtype=torch.float64)]
    loss = explicit_info_nce(*exact)
    assert 1e-5 < loss < 1e-3
    errors = []
    for function in (info_nce, ClipLoss()):
        inputs = [z.detach().float().requires_grad_() for z in exact]
        rounded = explicit_info_nce(*(leaf := [z.detach().double().requires_grad_() for z in inputs]))
        truth = torch.cat(torch.autograd.grad(rounded, leaf[:2]))
        found = torch.cat(torch.autograd.grad(function(*inputs), inputs[:2]))
        errors.append(((found - truth).norm() / truth.norm()).item())
    assert errors[0] * 20 < errors[1], errors


def test_products_are_in_bf16_and_sums_in_float32_where_autocast_asks_for_it() -> None:
    x, y, scale, _ = (z.detach() for z in pairs(32, 64, dtype=torch.float32))
    full = info_nce(x, y, scale)
    with torch.autocast("cpu", torch.bfloat16):
        inside = info_nce(x, y, scale)
    halves = info_nce(x.bfloat16(), y.bfloat16(), scale)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(halves, info_nce(x.bfloat16(), y.bfloat16(), scale))
        exact = info_nce(x.double(), y.double(), scale.double())
    assert exact.dtype == torch.float64
    assert torch.equal(exact, info_nce(x.double(), y.double(), scale.double())), "float64 stays, whatever autocast says"
    for one in (inside, halves):
        assert one.dtype == torch.float32
        assert not torch.equal(one, full)
        torch.testing.assert_close(one, full, rtol=5e-3, atol=0)


@pytest.mark.parametrize("products", ["fp32", "bf16"])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_term_has_products_as_it_is_told_whatever_is_around_it(products: Any, autocast: bool) -> None:
    x, y, scale, _ = (z.detach().requires_grad_() for z in pairs(32, 64, dtype=torch.float32))
    features = Features({"image_features": x, "text_features": y}, scale)
    with torch.autocast("cpu", torch.bfloat16, enabled=products == "bf16"):
        expected = info_nce(x, y, scale)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = InfoNCE(products=products)(features)
    assert torch.equal(found, expected)
    assert torch.equal(found, info_nce(x, y, scale)) == (products == "fp32")
    assert torch.autograd.grad(found, x)[0].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_have_the_dtype_of_the_features(dtype: torch.dtype) -> None:
    x, y, scale, _ = pairs(64, 32, dtype=torch.float32)
    halves = [z.detach().to(dtype).requires_grad_() for z in (x, y)]
    exact = [z.detach().double().requires_grad_() for z in halves]
    for keep in (False, True):
        found = torch.autograd.grad(info_nce(*halves, scale, tile=24, keep_logits=keep), halves)
        for one, other in zip(
            found, torch.autograd.grad(explicit_info_nce(*exact, scale.double()), exact), strict=True
        ):
            assert one.dtype == dtype
            assert (one.double() - other).norm() < (0.02 if dtype == torch.bfloat16 else 0.002) * other.norm()


BAD: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
    ((torch.ones(3, 2), torch.ones(4, 2)), {}, r"\[3, 2\] and \[4, 2\]"),
    ((torch.ones(3, 2), torch.ones(3, 3)), {}, r"\[3, 2\] and \[3, 3\]"),
    ((torch.ones(3), torch.ones(3)), {}, "matrices"),
    ((torch.ones(0, 2), torch.ones(0, 2)), {}, "a row"),
    ((torch.ones(3, 2).int(), torch.ones(3, 2).int()), {}, "floating-point"),
    ((torch.ones(3, 2), torch.ones(3, 2)), {"ids": torch.arange(4)}, "ids"),
    ((torch.ones(3, 2), torch.ones(3, 2)), {"ids": torch.ones(3)}, "ids"),
]


@pytest.mark.parametrize(("features", "asked", "said"), [*BAD, (BAD[-1][0], {"label_smoothing": 1.0}, "smoothing")])
def test_what_does_not_fit_is_refused(features: Any, asked: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        info_nce(*features, torch.tensor(1.0), **asked)


def test_the_term_aligns_the_pair_that_it_names() -> None:
    x, y, scale, _ = pairs(5)
    features = Features({"audio_features": x, "text_features": y, "image_features": -x}, scale)
    term = InfoNCE(weight=2.0, pair=("audio", "text"))
    assert term.needs() == {"audio_features", "text_features"}
    assert torch.equal(term(features), info_nce(x, y, scale))


@pytest.mark.parametrize("duplicates", ["negative", "positive", "masked"])
@pytest.mark.parametrize("same_by", ["caption", "label"])
def test_the_term_does_with_duplicates_as_it_is_told(duplicates: Any, same_by: Any) -> None:
    x, y, scale, _ = pairs(6)
    ids = some_ids(6)
    term = InfoNCE(label_smoothing=0.1, duplicates=duplicates, same_by=same_by)
    features = Features({"image_features": x, "text_features": y}, scale, ids={"other": ids[:1], same_by: ids})
    asked: dict[str, Any] = {} if duplicates == "negative" else {"ids": ids, "same": duplicates}
    assert (f"{same_by}_ids" in term.needs()) == (duplicates != "negative")
    torch.testing.assert_close(term(features), explicit_info_nce(x, y, scale, 0.1, **asked))
