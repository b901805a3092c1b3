"""The laws of micro-batches: the gradient is that of the whole batch, with the memory of a part of it."""

import copy
import math
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TINY, TinyConfig, composed
from explicit import explicit_info_nce, explicit_sigmoid
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from multimodal import lengths, step
from multimodal.batch import Batch, Features
from multimodal.config import ConfigError, ModelSection, RunError, TrainConfig, check
from multimodal.data.augment import Keep
from multimodal.dry_run import dry_run
from multimodal.losses.infonce import InfoNCE, info_nce
from multimodal.losses.sigmoid import Sigmoid, sigmoid_loss
from multimodal.model import Model
from multimodal.parts import Loss, TowerModule
from multimodal.step import _random_seed, replay_tolerance, training_step
from multimodal.towers.batch_norm import check_batch_norms, trained_batch_norms
from multimodal.towers.byte_bpe import ByteBPE
from multimodal.towers.text import TextPreprocessor
from multimodal.towers.text_transformer import TextTransformer
from multimodal.towers.vit import ViT
from multimodal.trainer import Trainer

ROWS, INPUTS, WIDTH = 16, 5, 8
FP32, BF16 = (torch.autocast("cpu", torch.bfloat16, enabled=enabled) for enabled in (False, True))
SEED = (3, 7)
SIZES = [None, 1, 4, 5, 12, 100]


class Noisy(TowerModule):
    """Two layers with dropout between, and a count of the passes."""

    def __init__(self, dropout: float = 0.4, norm: bool = False) -> None:
        super().__init__()
        self.width = WIDTH
        norms = [nn.BatchNorm1d(WIDTH)] if norm else []
        self.net = nn.Sequential(
            nn.Linear(INPUTS, WIDTH), *norms, nn.Dropout(dropout), nn.GELU(), nn.Linear(WIDTH, WIDTH)
        )
        self.projection = nn.Linear(WIDTH, 4, bias=False)
        self.register_buffer("seen", torch.zeros(()))
        self.seen: Tensor

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.seen += len(inputs)
        features: Tensor = self.net(inputs)
        return features

    def depths(self) -> list[list[nn.Parameter]]:
        return [[], list(self.net.parameters())]


class WithBias(Loss):
    """Reads all that a loss may read."""

    weight: float = 0.3

    def needs(self) -> frozenset[str]:
        return frozenset({"image_features", "text_features", "logit_bias", "ids"})

    def __call__(self, features: Features) -> Tensor:
        x, y = features.tensors["image_features"], features.tensors["text_features"]
        assert features.logit_bias is not None
        same = torch.eq(features.ids["caption"][:, None], features.ids["caption"])
        logits = features.logit_scale * x @ y.T + features.logit_bias
        return nn.functional.softplus(torch.where(same, -logits, logits)).mean()


LOSSES: dict[str, Loss] = {"infonce": InfoNCE(), "bias": WithBias()}


def model(**towers: Any) -> Model:
    torch.manual_seed(0)
    section = ModelSection(
        embed_dim=4, logit_scale=10.0, max_logit_scale=100.0, learn_logit_scale=True, logit_bias=-1.0
    )
    return Model({"image": Noisy(**towers), "text": Noisy()}, section).double().train()


def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    inputs = {k: torch.randn(ROWS, INPUTS, dtype=torch.float64, generator=generator) for k in ("image", "text")}
    return Batch(inputs, torch.arange(ROWS), {"caption": torch.arange(ROWS) // 2})


class Recorder(torch.optim.SGD):
    """Remembers the gradients that it is given, and changes nothing."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.grads = [None if p.grad is None else p.grad.clone() for p in self.param_groups[0]["params"]]


def gradients(
    one: Model,
    data: Batch,
    size: int | None,
    losses: Mapping[str, Loss] = LOSSES,
    context: torch.autocast = FP32,
    max_grad_norm: float | None = None,
) -> tuple[dict[str, Tensor], float]:
    recorder = Recorder(one.parameters(), lr=1)
    measured = training_step(one, losses, recorder, data, context, max_grad_norm, size, SEED)
    named = zip((name for name, _ in one.named_parameters()), recorder.grads, strict=True)
    return {name: grad for name, grad in named if grad is not None}, float(measured["loss"])


def all_terms(features: Features) -> Tensor:
    return torch.stack([term.weight * term(features) for term in LOSSES.values()]).sum()


def joint(
    one: Model,
    data: Batch,
    size: int | None,
    objective: Callable[[Features], Tensor] = all_terms,
    ranks: int = 1,
    context: torch.autocast = FP32,
) -> tuple[dict[str, Tensor], float]:
    """One graph over the batch of all ranks, their chunks under the same random states, and one backward."""
    parts: dict[str, list[Tensor]] = {}
    share = ROWS // ranks
    for place, tower in enumerate(one.towers):
        for rank, start in product(range(ranks), range(0, share, size or share)):
            torch.manual_seed(_random_seed(*SEED, rank, place, start))
            rows = slice(rank * share + start, rank * share + min(start + (size or share), share))
            given = data.pooled if tower in data.pooled else data.inputs
            encode = one.project if tower in data.pooled else one.encode
            known = [data.lengths[tower][rows]] if tower in data.lengths else []
            with context:
                parts.setdefault(f"{tower}_features", []).append(encode(tower, given[tower][rows], *known))
    features = {name: torch.cat(tensors) for name, tensors in parts.items()}
    loss = objective(Features(features, one.logit_scale.exp(), one.logit_bias, data.ids))
    loss.backward()
    return {name: p.grad for name, p in one.named_parameters() if p.grad is not None}, loss.item()


def assert_same(ours: tuple[dict[str, Tensor], float], theirs: tuple[dict[str, Tensor], float]) -> None:
    assert ours[1] == pytest.approx(theirs[1], abs=1e-12)
    assert ours[0].keys() == theirs[0].keys()
    for name, grad in ours[0].items():
        torch.testing.assert_close(grad, theirs[0][name], rtol=0, atol=1e-10, msg=name)


def frozen_tower(one: Model, data: Batch) -> Batch:
    one.towers["image"].requires_grad_(False)
    one.train()
    return data


def frozen_but_projection(one: Model, data: Batch) -> Batch:
    one.towers["image"].net.requires_grad_(False)  # type: ignore[union-attr]
    one.train()
    return data


def kept_features(one: Model, data: Batch) -> Batch:
    data = frozen_but_projection(one, data)
    pooled = one.towers["image"](data.inputs["image"])
    return Batch({"text": data.inputs["text"]}, data.indices, data.ids, pooled={"image": pooled.detach()})


def fixed_scale(one: Model, data: Batch) -> Batch:
    one.logit_scale.requires_grad_(False)
    return data


CASES: dict[str, Callable[[Model, Batch], Batch]] = {
    "all trained": lambda one, data: data,
    "frozen tower": frozen_tower,
    "frozen but its projection": frozen_but_projection,
    "kept features": kept_features,
    "fixed scale": fixed_scale,
}


@pytest.mark.parametrize(("case", "size"), list(product(CASES, SIZES)))
def test_gradients_are_those_of_one_joint_backward_with_dropout_on(case: str, size: int | None) -> None:
    ours, theirs = model(), model()
    assert_same(gradients(ours, CASES[case](ours, batch()), size), joint(theirs, CASES[case](theirs, batch()), size))


class InfoNCEInTiles(InfoNCE):
    """In tiles that divide the batch, or do not, and are not kept."""

    tile: int

    def compare(self, x: Tensor, y: Tensor, features: Features) -> Tensor:
        asked: dict[str, Any] = {"tile": self.tile, "keep_logits": False, "label_smoothing": self.label_smoothing}
        return info_nce(x, y, features.logit_scale, **asked, **self.targets(features))


class SigmoidInTiles(Sigmoid):
    """Likewise."""

    tile: int

    def compare(self, x: Tensor, y: Tensor, features: Features) -> Tensor:
        assert features.logit_bias is not None
        asked: dict[str, Any] = {"tile": self.tile, "exchange": self.exchange}
        return sigmoid_loss(x, y, features.logit_scale, features.logit_bias, **asked, **self.targets(features))


PAIR_LOSSES: dict[str, Loss] = {
    "infonce": InfoNCE(),
    "infonce in tiles": InfoNCEInTiles(tile=4),
    "infonce smoothed": InfoNCEInTiles(tile=5, label_smoothing=0.1),
    "infonce positive": InfoNCEInTiles(tile=3, duplicates="positive"),
    "infonce masked smoothed": InfoNCEInTiles(tile=5, duplicates="masked", label_smoothing=0.1),
    "sigmoid": Sigmoid(),
    "sigmoid smaller tiles": SigmoidInTiles(tile=5),
    "sigmoid positive": SigmoidInTiles(tile=4, duplicates="positive"),
    "sigmoid masked in a ring": SigmoidInTiles(tile=3, duplicates="masked", exchange="ring"),
}


def by_definition(loss: Loss, features: Features) -> Tensor:
    """A loss on the whole B x B matrix."""
    assert isinstance(loss, InfoNCE | Sigmoid)
    (x, y), targets = loss.features(features), loss.targets(features)
    if isinstance(loss, InfoNCE):
        return explicit_info_nce(x, y, features.logit_scale, loss.label_smoothing, **targets)
    assert features.logit_bias is not None
    return explicit_sigmoid(x, y, features.logit_scale, features.logit_bias, **targets)


@pytest.mark.parametrize(("name", "size"), list(product(PAIR_LOSSES, [1, 4, 5])))
def test_gradients_of_each_loss_are_those_of_its_definition(name: str, size: int) -> None:
    loss = PAIR_LOSSES[name]
    ours = gradients(model(), batch(), size, {"loss": loss})
    assert_same(ours, joint(model(), batch(), size, partial(by_definition, loss)))


def test_without_dropout_the_size_changes_nothing() -> None:
    def without(size: int | None) -> tuple[dict[str, Tensor], float]:
        one = model().eval()
        return gradients(one, batch(), size)

    for size in SIZES[1:]:
        assert_same(without(size), without(None))


def test_dropout_is_on_in_these_tests() -> None:
    one = model()
    first = gradients(one, batch(), 4)
    other = training_step(one, LOSSES, Recorder(one.parameters(), lr=1), batch(), FP32, None, 4, (3, 8))
    assert float(other["loss"]) != first[1], "another step has other masks"


def test_random_states_differ_by_seed_step_rank_tower_and_row() -> None:
    places = list(product(range(4), range(4), range(3), range(2), range(0, 12, 4)))
    assert len({_random_seed(*place) for place in places}) == len(places)
    assert all(_random_seed(*place) == _random_seed(*place) for place in places)


@pytest.mark.parametrize("size", SIZES)
def test_buffers_count_every_row_once(size: int | None) -> None:
    one = model()
    gradients(one, batch(), size)
    assert [tower.seen.item() for tower in one.towers.values()] == [ROWS, ROWS]  # type: ignore[union-attr,operator]


class OwnNoise(Noisy):
    """Draws from a generator that no seed of torch's is for."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs + 0.3 * torch.randn(inputs.shape, dtype=inputs.dtype, generator=self.generator))


@pytest.mark.parametrize("tower", [Noisy, OwnNoise])
def test_random_numbers_that_cannot_be_replayed_are_noticed(tower: type[Noisy]) -> None:
    one = model()
    one.towers["image"] = tower().double()
    measured = training_step(one, LOSSES, Recorder(one.parameters(), lr=1), batch(), FP32, None, 4, SEED)
    if tower is Noisy:
        assert measured["replay_error"] == 0
        assert measured["updated"] == 1
    else:
        assert measured["replay_error"] > replay_tolerance(BF16) > replay_tolerance(FP32)
        assert (measured["finite"], measured["updated"]) == (1, 0)


def test_a_run_stops_where_they_cannot_be_replayed(tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    noisy = tiny_config("towers.image.patch_dropout=0.5", "micro_batch_size=4", "duration=2steps")
    monkeypatch.setattr(step, "_random_seed", lambda *_: int(torch.randint(2**32, ())))
    Trainer(noisy).run()
    monkeypatch.setattr(torch, "manual_seed", lambda _: None)
    with pytest.raises(RunError, match="micro_batch_size: a tower gave other features in the second pass"):
        Trainer(noisy.model_copy(update={"run": noisy.run.model_copy(update={"name": "other"})})).run()


@pytest.mark.parametrize("size", [4, 5])
def test_in_bf16_the_gradient_is_that_of_one_joint_backward_in_bf16(size: int) -> None:
    data = batch()
    data = Batch({name: x.float() for name, x in data.inputs.items()}, data.indices, data.ids)
    ours, loss = gradients(model().float(), data, size, context=BF16)
    theirs, expected = joint(model().float(), data, size, context=BF16)
    assert loss == pytest.approx(expected, rel=1e-6)
    for name, grad in ours.items():
        torch.testing.assert_close(grad, theirs[name], rtol=0, atol=1e-6 * float(theirs[name].abs().max()), msg=name)
    exact, _ = joint(model(), batch(), size)
    assert any(not torch.allclose(grad.double(), exact[name], rtol=1e-4) for name, grad in ours.items()), "it is bf16"


@pytest.mark.parametrize("size", [None, 5])
def test_the_norm_that_is_clipped_is_that_of_the_whole_batch(size: int | None) -> None:
    limit = 0.01
    ours, _ = gradients(model(), batch(), size, max_grad_norm=limit)
    theirs, _ = joint(model(), batch(), size)
    norm = torch.stack([grad.norm() for grad in theirs.values()]).norm()
    assert norm > 2 * limit
    for name, grad in ours.items():
        torch.testing.assert_close(grad, theirs[name] * limit / norm, rtol=1e-4, atol=0, msg=name)


@pytest.mark.parametrize("row", [0, ROWS - 1])
def test_one_broken_row_of_any_chunk_leaves_the_weights_alone(row: int) -> None:
    one, data = model(), batch()
    optimizer = torch.optim.AdamW(one.parameters(), lr=0.1, fused=True)
    for broken in (False, True):
        data.inputs["image"][row] = math.nan if broken else 1.0
        before = copy.deepcopy(one.state_dict())
        measured = training_step(one, LOSSES, optimizer, data, FP32, 1.0, 5, SEED)
        assert bool(measured["finite"]) != broken
        changed = [name for name, p in one.named_parameters() if not torch.equal(p, before[name])]
        assert bool(changed) != broken, changed


class Checkpointed(Noisy):
    """Computes its network a second time in the backward pass."""

    def forward(self, inputs: Tensor) -> Tensor:
        features: Tensor = checkpoint(self.net, inputs, use_reentrant=False)
        return features


def test_what_is_computed_again_in_the_backward_counts_once() -> None:
    one = model()
    one.towers["image"] = Checkpointed(norm=True).double()
    gradients(one.train(), batch(), None)
    assert int(one.towers["image"].net[1].num_batches_tracked) == 1  # type: ignore[union-attr,index]


@pytest.mark.parametrize("size", [4, 5])
@pytest.mark.parametrize("grad_checkpointing", [False, True])
def test_real_towers_draw_the_same_masks_in_both_passes(
    size: int, grad_checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def real() -> tuple[Model, Batch]:
        torch.manual_seed(0)
        shared = {"width": 16, "layers": 2, "heads": 2, "drop_path": 0.5, "grad_checkpointing": grad_checkpointing}
        colours = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
        image = ViT(**shared, **colours, image_size=32, patch_size=8, mlp_ratio=2.0, pool="tok", patch_dropout=0.5)
        tokenizer = ByteBPE(vocab_size=300, max_captions=10)
        text = TextTransformer(**shared, tokenizer=tokenizer, context_length=8, mlp_ratio=2.0)
        encoding: Any = SimpleNamespace(vocab_size=300, pad=0, end=299)
        built = {
            "image": image.build(image.preprocessor(list, Keep(), None), 4),
            "text": text.build(TextPreprocessor(encoding, 8), 4),
        }
        section = {"embed_dim": 4, "logit_scale": 10.0, "max_logit_scale": 100.0, "learn_logit_scale": True}
        one = Model(built, ModelSection(**section, logit_bias=-1.0)).double().train()
        ids = torch.randint(1, 299, (ROWS, 8))
        ids[torch.arange(ROWS), torch.arange(ROWS) % 6 + 1] = 299
        inputs = {"image": torch.randint(0, 256, (ROWS, 3, 32, 32), dtype=torch.uint8), "text": ids}
        return one, Batch(inputs, torch.arange(ROWS), batch().ids, lengths=one.lengths(inputs))

    monkeypatch.setattr(lengths, "OVERHEAD", 1)  # so that there are several chunks of captions in each of the batch
    ours, theirs = real(), real()
    assert_same(gradients(*ours, size), joint(*theirs, size))


@pytest.mark.parametrize("size", SIZES)
def test_a_tower_whose_trained_weights_are_not_used_is_passed_over(size: int | None) -> None:
    one = frozen = model()
    one.towers["image"].spare = nn.Linear(2, 2).double()
    frozen_tower(one, batch())
    one.towers["image"].spare.requires_grad_(True)  # type: ignore[union-attr]
    data = batch()
    recorder = Recorder([p for name, p in frozen.named_parameters() if "spare" not in name], lr=1)
    assert math.isfinite(float(training_step(one, LOSSES, recorder, data, FP32, None, size, SEED)["loss"]))


def test_a_frozen_tower_costs_the_loss_no_gradient() -> None:
    seen: list[bool] = []

    class Looks(InfoNCE):
        def __call__(self, features: Features) -> Tensor:
            seen.append(features.tensors["image_features"].requires_grad)
            return super().__call__(features)

    for size in (None, 4):
        one = model()
        frozen_tower(one, batch())
        training_step(one, {"a": Looks()}, Recorder(one.parameters(), lr=1), batch(), FP32, None, size, SEED)
    assert seen == [False, False]


@pytest.mark.parametrize("start", [dry_run, lambda config: Trainer(config).run()])
def test_batch_norm_and_micro_batches_are_refused_before_the_start(start: Any, tmp_path: Path) -> None:
    base = [word for word in TINY if "towers.image" not in word]
    image = ("tower@towers.image=resnet_tiny", "towers.image.image_size=32", "towers.image.width=8")
    config = check(composed(*base, *image, "micro_batch_size=4", f"paths.runs={tmp_path}"), TrainConfig)
    with pytest.raises(ConfigError, match=r"micro_batch_size: the statistics of a batch norm"):
        start(config)


def test_a_batch_norm_over_the_rows_of_one_rank_is_refused_on_several(monkeypatch: pytest.MonkeyPatch) -> None:
    one = model(norm=True)
    check_batch_norms(one)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"towers\.image\.net\.1 is a batch norm over the rows of one rank"):
        check_batch_norms(one)
    check_batch_norms(model())
    frozen_tower(one, batch())
    check_batch_norms(one)


@pytest.mark.parametrize("value", [0, -3, True, "many", 1.5])
def test_what_is_no_size_is_told_in_one_line(value: Any, tiny_raw: dict[str, Any]) -> None:
    tiny_raw["micro_batch_size"] = value
    with pytest.raises(
        ConfigError, match=r"1 problem.*\n  micro_batch_size: should be a positive number, auto or null"
    ):
        check(tiny_raw, TrainConfig)


def test_a_batch_norm_that_is_trained_needs_the_whole_batch() -> None:
    one = model(norm=True)
    assert list(trained_batch_norms(one)) == ["towers.image.net.1"]
    assert not trained_batch_norms(model())
    frozen_tower(one, batch())
    assert not trained_batch_norms(one)
