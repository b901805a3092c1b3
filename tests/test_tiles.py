"""What holds for the losses because they are computed in tiles: memory, and range."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from explicit import explicit_info_nce, explicit_sigmoid, pairs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from multimodal.losses import logsumexp
from multimodal.losses.infonce import info_nce
from multimodal.losses.sigmoid import sigmoid_loss
from multimodal.losses.tiles import Tiles, blocks

TILE = 16


def streamed_info_nce(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, **asked: Any) -> Tensor:
    return info_nce(x, y, scale, tile=TILE, keep_logits=False, **asked) + 0 * bias


def streamed_sigmoid(*inputs: Tensor, **asked: Any) -> Tensor:
    return sigmoid_loss(*inputs, tile=TILE, **asked)


LOSSES = [
    (streamed_info_nce, {}),
    (streamed_info_nce, {"label_smoothing": 0.1, "same": "positive"}),
    (streamed_info_nce, {"label_smoothing": 0.1, "same": "masked"}),
    (streamed_sigmoid, {}),
    (streamed_sigmoid, {"same": "positive"}),
    (streamed_sigmoid, {"same": "masked"}),
]


def with_ids(asked: dict[str, Any], rows: int) -> dict[str, Any]:
    return asked | ({"ids": torch.arange(rows) // 2} if "same" in asked else {})


class Watch(TorchDispatchMode):
    """Notes how large the largest tensor is that any operation makes, and counts products of matrices."""

    elements = products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.products += func._overloadpacket.__name__ in ("mm", "addmm_", "addmm", "bmm")
        for one in tree_leaves(result):
            if isinstance(one, Tensor):
                self.elements = max(self.elements, one.untyped_storage().nbytes() // one.element_size())
        return result


@pytest.mark.parametrize(("loss", "asked"), LOSSES)
def test_no_tensor_is_larger_than_the_features_or_a_tile(loss: Callable[..., Tensor], asked: dict[str, Any]) -> None:
    inputs = pairs(256, dims=4)
    with Watch() as watch:
        loss(*inputs, **with_ids(asked, 256)).backward()
    assert 0 < watch.elements <= max(256 * 4, TILE * TILE)


@pytest.mark.parametrize(("loss", "asked"), LOSSES)
def test_what_is_saved_for_the_backward_grows_with_the_batch(
    loss: Callable[..., Tensor], asked: dict[str, Any]
) -> None:
    def saved_bytes(rows: int) -> int:
        storages: dict[int, int] = {}

        def note(z: Tensor) -> Tensor:
            storages[z.untyped_storage().data_ptr()] = z.untyped_storage().nbytes()
            return z

        inputs = pairs(rows, dims=4)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda z: z):
            value = loss(*inputs, **with_ids(asked, rows))
        value.backward()
        return sum(storages.values())

    assert 0 < saved_bytes(256) <= 4.1 * saved_bytes(64)


class Calls:
    """Counts how often a tile was taken together and how often apart, in the forward and in the backward."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts = dict.fromkeys(("add_together", "add_apart", "weights_together", "weights_apart"), 0)
        for owner, name in (
            (logsumexp, "_add_together"),
            (logsumexp._Running, "add_apart"),
            (logsumexp, "_weights_together"),
            (logsumexp, "_weights_apart"),
        ):
            monkeypatch.setattr(owner, name, self.counted(name.strip("_"), getattr(owner, name)))

    def counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            result = function(*args)
            self.counts[name] += result is not False and (result is not None or name == "add_apart")
            return result

        return call


def far_apart(direction: str) -> tuple[Tensor, ...]:
    """Rows (or columns) of one tile between whose greatest logits there is more than float32 has room for."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(TILE, 8, generator=generator, dtype=torch.float32) for _ in range(2))
    # The first coordinate shifts all logits of a row, or of a column, alike.
    x[:, 0], y[:, 0] = 1, 1
    (x if direction == "rows" else y)[: TILE // 2, 0] = 250
    return tuple(z.requires_grad_() for z in (x, y, torch.tensor(1.0), torch.tensor(-100.0)))


@pytest.mark.parametrize("direction", ["rows", "columns"])
@pytest.mark.parametrize("keep", [False, True])
def test_rows_and_columns_far_below_the_rest_of_their_tile_are_as_accurate(
    direction: str, keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y, scale, _ = inputs = far_apart(direction)
    greatest = (x @ y.T).fill_diagonal_(-torch.inf).amax(1 if direction == "rows" else 0)
    assert greatest.max() - greatest.min() > 200, "more than float32 has between its least and its greatest power"
    calls = Calls(monkeypatch)
    exact = [z.detach().double().requires_grad_() for z in inputs[:3]]
    ours, truth = info_nce(x, y, scale, tile=TILE, keep_logits=keep), explicit_info_nce(*exact)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=0)
    for one, other in zip(torch.autograd.grad(ours, inputs[:3]), torch.autograd.grad(truth, exact), strict=True):
        rows, others = (z.view(len(z), -1) if z.ndim else z.view(1, 1) for z in (one.double(), other))
        assert ((rows - others).norm(dim=1) <= 1e-4 * others.norm(dim=1)).all()
    assert calls.counts == {"add_together": 0, "add_apart": 2, "weights_together": 0, "weights_apart": 1}


def test_a_backward_whose_sums_are_far_apart_may_follow_a_forward_whose_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows of one tile have their greatest logit in another."""
    x, y, scale, _ = (z.detach() for z in far_apart("columns"))
    y = torch.cat([y[TILE // 2 :], y[: TILE // 2]])
    x[: TILE // 2, 1:] *= 0.1
    x[: TILE // 2, 0] = 0
    inputs = [z.requires_grad_() for z in (x, y, scale)]
    exact = [z.detach().double().requires_grad_() for z in inputs]
    calls = Calls(monkeypatch)
    ours, truth = info_nce(*inputs, tile=TILE // 2, keep_logits=False), explicit_info_nce(*exact)
    for one, other in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(truth, exact), strict=True):
        assert (one.double() - other).norm() <= 1e-4 * other.norm()
    assert calls.counts["add_together"] == 4
    assert calls.counts["weights_apart"] > 0


def test_tiles_of_unit_features_are_taken_together(monkeypatch: pytest.MonkeyPatch) -> None:
    for scale in (1.0, 14.0, 100.0):
        with monkeypatch.context() as patch:
            calls = Calls(patch)
            x, y, multiplier, _ = pairs(2 * TILE, 64, torch.float32)
            multiplier.data.fill_(scale)
            info_nce(x, y, multiplier, tile=TILE, keep_logits=False).backward()
            assert calls.counts == {"add_together": 4, "add_apart": 0, "weights_together": 4, "weights_apart": 0}


def test_where_a_look_would_wait_for_the_device_the_result_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = pairs(20)[:3]
    together = info_nce(*inputs, tile=TILE)
    expected = torch.autograd.grad(together, inputs)
    monkeypatch.setattr(logsumexp, "_answers_at_once", lambda x: False)
    calls = Calls(monkeypatch)
    apart = info_nce(*inputs, tile=TILE)
    torch.testing.assert_close(apart, together, rtol=0, atol=1e-12)
    for one, other in zip(torch.autograd.grad(apart, inputs), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    assert calls.counts == {"add_together": 0, "add_apart": 8, "weights_together": 0, "weights_apart": 4}


@pytest.mark.parametrize("tiles", [1, 3])
def test_parts_that_come_far_below_or_above_what_was_there_before_are_added_right(tiles: int) -> None:
    for order in (1, -1):
        x, y, scale, _ = (z.detach() for z in far_apart("columns"))
        y = torch.cat([y[:8], y[8:]][::order])
        ours = info_nce(x, y, scale, tile=TILE // tiles, keep_logits=False)
        truth = explicit_info_nce(*(z.double() for z in (x, y, scale)))
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=0)


def test_the_sigmoid_loss_is_accurate_over_the_whole_range() -> None:
    inputs = far_apart("rows")
    exact = [z.detach().double().requires_grad_() for z in inputs]
    ours, truth = sigmoid_loss(*inputs, tile=5), explicit_sigmoid(*exact)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=0)
    for one, other in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(truth, exact), strict=True):
        assert (one.double() - other).norm() <= 1e-5 * other.norm()


def test_every_logit_is_computed_once_and_partners_and_equal_ids_do_not_count() -> None:
    x, y, scale, _ = (z.detach() for z in pairs(7))
    ids = torch.tensor([0, 1, 0, 2, 3, 3, 4])
    seen = torch.full((4, 7), torch.nan, dtype=torch.float64)
    for rows, columns, logits in Tiles(x[2:6], y, scale, torch.float64, 3, 2, (ids[2:6], ids)):
        assert seen[rows, columns].isnan().all()
        seen[rows, columns] = logits
    expected = (scale * x @ y.T)[2:6].masked_fill(ids[2:6, None] == ids, -torch.inf)
    torch.testing.assert_close(seen, expected)


@pytest.mark.parametrize(("keep", "frozen", "expected"), [(False, False, 4), (True, False, 3), (False, True, 3)])
def test_a_tile_takes_as_many_products_as_are_needed(keep: bool, frozen: bool, expected: int) -> None:
    x, y, scale, _ = pairs(2 * TILE)
    x = x.detach() if frozen else x
    with Watch() as watch:
        info_nce(x, y, scale, tile=TILE, keep_logits=keep).backward()
    assert watch.products == expected * 4


def test_blocks_make_up_the_whole() -> None:
    assert [(b.start, b.stop) for b in blocks(7, 3)] == [(0, 3), (3, 6), (6, 7)]
