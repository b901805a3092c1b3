"""What several ranks compute is what one process computes on the whole batch, gradients included."""

import math
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any, Literal

import pytest
import test_micro_batches as micro
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from explicit import explicit_info_nce, explicit_sigmoid, pairs, some_ids
from test_tiles import Watch
from torch import Tensor

from multimodal import distributed
from multimodal.batch import Batch
from multimodal.config import ConfigError, ModelSection
from multimodal.data.augment import Keep
from multimodal.losses.infonce import InfoNCE, info_nce
from multimodal.losses.sigmoid import sigmoid_loss
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
    distributed.stop()


def on_ranks(ranks: int, task: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `task` returns on each of several real processes."""
    with mp.Manager() as manager, tempfile.TemporaryDirectory() as folder:
        results = manager.dict()
        mp.spawn(_work, (ranks, f"{folder}/meeting", task, arguments, results), nprocs=ranks)
        return [results[rank] for rank in range(ranks)]


def mine(x: Tensor) -> Tensor:
    return x.chunk(distributed.world_size())[distributed.rank()]


TARGETS: list[dict[str, Any]] = [{}, {"same": "positive"}, {"same": "masked"}]
PAIR_LOSSES: list[tuple[str, dict[str, Any]]] = [
    *(
        ("info_nce", {**target, "label_smoothing": smoothing, "tile": tile, "keep_logits": keep})
        for target in TARGETS
        for smoothing in (0.0, 0.1)
        for tile, keep in ((4, False), (5, False), (5, True), (1024, False))
    ),
    *(
        ("sigmoid_loss", {**target, "exchange": exchange, "tile": tile})
        for target in TARGETS
        for exchange in ("gather", "ring")
        for tile in (4, 5, 1024)
    ),
]
LOSS_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "info_nce": lambda x, y, scale, bias, **asked: info_nce(x, y, scale, **asked),
    "sigmoid_loss": sigmoid_loss,
}
EXPLICIT: dict[str, Callable[..., Tensor]] = {
    "info_nce": lambda x, y, scale, bias, **asked: explicit_info_nce(x, y, scale, **asked),
    "sigmoid_loss": explicit_sigmoid,
}


def _pair_losses(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> list[tuple[Tensor, ...]]:
    """Of every case: the loss, and the gradients as training has them."""
    found = []
    for name, asked in PAIR_LOSSES:
        leaves = [leaf.detach().clone().requires_grad_() for leaf in (mine(x), mine(y), scale, bias)]
        ids = {"ids": mine(some_ids(len(x)))} if "same" in asked else {}
        loss = LOSS_FUNCTIONS[name](*leaves, **ids, **asked)
        loss.backward()
        x_grad, y_grad, *rest = (torch.zeros(()) if leaf.grad is None else leaf.grad for leaf in leaves)
        parameters = [torch.nn.Parameter(leaf) for leaf in leaves[2:]]
        for parameter, grad in zip(parameters, rest, strict=True):
            parameter.grad = grad.to(parameter.dtype)
        distributed.average_gradients(parameters)
        ranks = distributed.world_size()
        found.append((loss.detach(), x_grad / ranks, y_grad / ranks, *(p.grad for p in parameters)))
    return found


def _refusal(loss: Callable[[], Tensor]) -> str:
    try:
        return f"no error: {loss()}"
    except ValueError as error:
        return str(error)


def _disagreements() -> tuple[list[tuple[str, str]], str]:
    """Rank 1 comes with something else than rank 0: what they are told, beside words of it; then a loss of all."""
    other = distributed.rank() == 1
    x, scale = torch.ones(4, 3), torch.tensor(1.0)
    ids = torch.arange(4)
    cases: list[tuple[str, tuple[Tensor, Tensor], dict[str, Any]]] = [
        ("[3, 3]", (x[:3], x[:3]) if other else (x, x), {}),
        ("[4, 2]", (x[:, :2], x[:, :2]) if other else (x, x), {}),
        ("float64", (x.double(), x.double()) if other else (x, x), {}),
        ("[2, 3]", (x, x[:2]) if other else (x, x), {}),
        ("[0, 3]", (x[:0], x[:0]) if other else (x, x), {}),
        (" ids", (x, x), {"ids": ids} if other else {}),
        ("of 4 rows", (x, x), {"ids": ids[:2] if other else ids}),
        ("masked", (x, x), {"ids": ids, "same": "masked" if other else "positive"}),
        ("gradients for y", (x, x.clone().requires_grad_(other)), {}),
    ]
    told = []
    for words, features, asked in cases:
        losses = [partial(info_nce, *features, scale, **asked)]
        losses += [partial(sigmoid_loss, *features, scale, scale, **asked, exchange=e) for e in ("gather", "ring")]
        told += [(words, _refusal(loss)) for loss in losses]
    for smoothing, words in ((0.1, "label_smoothing=0.1"), (1.0, "[0, 1), got 1.0")):
        loss = partial(info_nce, x, x, scale, label_smoothing=smoothing if other else 0.2)
        told.append((words, _refusal(loss)))
    exchange: Literal["gather", "ring"] = "ring" if other else "gather"
    told.append(("by ring", _refusal(partial(sigmoid_loss, x, x, scale, scale, exchange=exchange))))
    for bf16 in (partial(info_nce, x, x, scale), partial(sigmoid_loss, x, x, scale, scale)):
        with torch.autocast("cpu", torch.bfloat16, enabled=other):
            told.append(("in torch.bfloat16", _refusal(bf16)))
    return told, f"{info_nce(x, x, scale):.3f}"


def _largest(exchange: Literal["gather", "ring"]) -> int:
    """The most elements that a tensor has in the sigmoid loss of 16 rows a rank, 64 wide."""
    inputs = pairs(16, 64)
    with Watch() as watch:
        sigmoid_loss(*inputs, exchange=exchange, tile=8).backward()
    return watch.elements


FromEachRank = tuple[list[tuple[Tensor, ...]], tuple[list[tuple[str, str]], str], tuple[int, int]]
OnEachRank = list[FromEachRank]


def _losses_on_each_rank(*inputs: Tensor) -> FromEachRank:
    return _pair_losses(*inputs), _disagreements(), (_largest("ring"), _largest("gather"))


@pytest.fixture(scope="module", params=[2, 3, 4])
def on_each_rank(request: pytest.FixtureRequest) -> OnEachRank:
    """Everything about losses over pairs from one start of processes, which takes longer than all of it."""
    return on_ranks(request.param, _losses_on_each_rank, *(z.detach() for z in pairs(12, 5)))


def test_losses_over_pairs_and_their_gradients_are_those_of_the_global_batch(on_each_rank: OnEachRank) -> None:
    inputs = pairs(12, 5)
    found = [losses for losses, _, _ in on_each_rank]
    for case, (name, asked) in enumerate(PAIR_LOSSES):
        ids = {"ids": some_ids(12)} if "same" in asked else {}
        target = {key: value for key, value in asked.items() if key in ("same", "label_smoothing")} | ids
        explicit = (
            explicit_info_nce(*inputs[:3], **target) if name == "info_nce" else explicit_sigmoid(*inputs, **target)
        )
        expected = torch.autograd.grad(explicit, inputs, allow_unused=True, materialize_grads=True)
        by_rank = [one[case] for one in found]
        close = partial(torch.testing.assert_close, rtol=0, atol=1e-10, msg=lambda m: f"{name} {asked}: {m}")  # noqa: B023
        for loss, _, _, scale_grad, bias_grad in by_rank:
            close(loss, explicit.detach())
            close(scale_grad, expected[2])
            close(bias_grad, expected[3])
        close(torch.cat([one[1] for one in by_rank]), expected[0])
        close(torch.cat([one[2] for one in by_rank]), expected[1])


def test_ranks_that_disagree_are_all_told_so(on_each_rank: OnEachRank) -> None:
    for _, (refusals, afterwards), _ in on_each_rank:
        assert afterwards == f"{math.log(4 * len(on_each_rank)):.3f}"
        for words, told in refusals:
            assert "no error" not in told
            assert words in told


def test_in_the_ring_no_rank_holds_the_features_of_all(on_each_rank: OnEachRank) -> None:
    for _, _, (ring, gather) in on_each_rank:
        assert ring <= 16 * 64
        assert gather == len(on_each_rank) * 16 * 64


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
    for step, (x, y) in enumerate(images):
        batch = Batch({"x": mine(x), "y": mine(y)}, torch.arange(len(mine(x))))
        context = torch.autocast("cpu", enabled=False)
        training_step(model, losses, optimizer, batch, context, 0.5, micro_batch_size, (0, step))
    return model.state_dict()


@pytest.mark.parametrize(("tower", "micro_batch_size"), [(VIT, None), (VIT, 3), (RESNET, None)])
def test_training_on_two_ranks_is_training_on_one(tower: ImageTower, micro_batch_size: int | None) -> None:
    images = torch.randint(0, 256, (3, 2, 8, 3, tower.image_size, tower.image_size), dtype=torch.uint8)
    expected = _train(tower, images, None)
    for found in on_ranks(2, _train, tower, images, micro_batch_size):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9, msg=name)


def _steps(sizes: list[int | None]) -> list[tuple[dict[str, Tensor], float]]:
    """The gradients of a step of every loss over pairs, in micro-batches of some sizes, with dropout."""
    data = micro.batch()
    inputs, ids = ({k: mine(x) for k, x in given.items()} for given in (data.inputs, data.ids))
    share = Batch(inputs, mine(data.indices), ids)
    losses = micro.PAIR_LOSSES.values()
    return [micro.gradients(micro.model(), share, size, {"loss": loss}) for loss, size in product(losses, sizes)]


@pytest.mark.parametrize("ranks", [2, 4])
def test_micro_batches_on_ranks_have_the_gradient_of_the_definition(ranks: int) -> None:
    sizes: list[int | None] = [None, 1, 2, 3]
    losses = micro.PAIR_LOSSES.values()
    expected = [
        micro.joint(micro.model(), micro.batch(), size, partial(micro.by_definition, loss), ranks)
        for loss, size in product(losses, sizes)
    ]
    for found in on_ranks(ranks, _steps, sizes):
        for ours, theirs in zip(found, expected, strict=True):
            micro.assert_same(ours, theirs)


class _Skips(micro.Noisy):
    """Leaves its last layer out on the second rank."""

    def forward(self, inputs: Tensor) -> Tensor:
        whole = distributed.rank() == 0 or distributed.world_size() == 1
        features: Tensor = self.net(inputs) if whole else self.net[:-1](inputs)
        return features


def _step_of_unlike_ranks(broken: bool) -> tuple[dict[str, Tensor], float, list[int]]:
    """A step in micro-batches whose ranks train other layers; the second one's inputs may be broken."""
    one = micro.model()
    one.towers["image"] = _Skips(dropout=0.0).double()
    data = micro.batch()
    share = Batch(
        {k: mine(x) for k, x in data.inputs.items()}, mine(data.indices), {"caption": mine(data.ids["caption"])}
    )
    if broken and distributed.rank() == 1:
        share.inputs["image"][0] = math.nan
    sizes: list[int] = []
    reduce = dist.all_reduce

    def counted(tensor: Tensor, *arguments: Any) -> Any:
        sizes.append(tensor.numel())
        return reduce(tensor, *arguments)

    dist.all_reduce = counted
    optimizer = torch.optim.AdamW(one.parameters(), lr=0.1, fused=True)
    measured = training_step(one, {"infonce": InfoNCE()}, optimizer, share, micro.FP32, 1.0, 3, micro.SEED)
    dist.all_reduce = reduce
    return dict(one.named_parameters()), float(measured["finite"]), sizes


@pytest.mark.parametrize("broken", [False, True])
def test_ranks_that_train_other_layers_or_break_stay_the_same(broken: bool) -> None:
    before = micro.model()
    (ours, finite, sizes), (theirs, others_finite, _) = on_ranks(2, _step_of_unlike_ranks, broken)
    assert finite == others_finite == float(not broken)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    changed = [k for k, p in before.towers["text"].named_parameters() if not torch.equal(p, ours[f"towers.text.{k}"])]
    assert bool(changed) != broken
    parameters = sum(p.numel() for p in before.parameters() if p.requires_grad) - 1  # no loss reads the bias
    assert sizes.count(parameters) == 1, "all gradients in one reduction, whatever the number of micro-batches"
    assert max(size for size in sizes if size != parameters) < parameters / 2


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
