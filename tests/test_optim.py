"""The laws of parameter groups, optimizers and schedules."""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
from open_clip_train.scheduler import cosine_lr
from torch import Tensor, nn

from multimodal.config import ModelSection
from multimodal.model import Model
from multimodal.optim import (
    AdamW,
    Constant,
    Cosine,
    InverseSqrt,
    WarmupStableDecay,
    heeding_found_inf,
    parameter_groups,
)
from multimodal.optimizers.lion import Lion
from multimodal.optimizers.muon import Muon
from multimodal.parts import Optimizer, Schedule, TowerModule, Tuning

SECTION = ModelSection(embed_dim=2, logit_scale=10.0, max_logit_scale=100.0, learn_logit_scale=True, logit_bias=None)
ADAMW = AdamW(lr=0.5, weight_decay=0.1, betas=(0.9, 0.98), eps=1e-6)
LION = Lion(lr=0.5, weight_decay=0.1, betas=(0.9, 0.99))
MUON = Muon(lr=0.5, weight_decay=0.1, momentum=0.9, nesterov=True, ns_steps=5, betas=(0.9, 0.98), eps=1e-6)
OPTIMIZERS = (ADAMW, LION, MUON)

SCHEDULES = {
    "cosine": Cosine(final_lr=0.1),
    "linear": WarmupStableDecay(decay=0.2, form="linear", final_lr=0.1),
    "1-sqrt": WarmupStableDecay(decay=0.2, form="1-sqrt", final_lr=0.1),
    "all of it": WarmupStableDecay(decay=1.0, form="linear", final_lr=0.1),
    "constant": Constant(),
    "inverse_sqrt": InverseSqrt(timescale=30),
}


def by_name(table: Mapping[str, Schedule]) -> Any:
    return pytest.mark.parametrize("schedule", table.values(), ids=table.keys())


@by_name(SCHEDULES)
@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (1, 10), (7, 50), (50, 50), (0, 1)])
def test_a_schedule_rises_in_a_line_to_the_peak_and_never_rises_again(
    schedule: Schedule, warmup: int, total: int
) -> None:
    rates = [schedule(step, warmup, total) for step in range(total)]
    assert rates[:warmup] == pytest.approx([(step + 1) / warmup for step in range(warmup)])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert max(rates) == rates[max(0, warmup - 1)] == 1
    assert all(0 < rate <= 1 for rate in rates)
    assert schedule(10 * total, warmup, total) <= rates[-1]


@by_name(SCHEDULES)
def test_a_schedule_has_no_jumps(schedule: Schedule) -> None:
    """A hundred times as many steps make the largest change from one to the next ten times smaller, or more."""
    largest = []
    for scale in (1, 100):
        finer = schedule.model_copy(update={"timescale": 30 * scale})  # the others have none
        rates = [finer(step, 10 * scale, 100 * scale) for step in range(101 * scale)]
        largest.append(max(abs(after - before) for before, after in pairwise(rates)))
    assert largest[1] <= largest[0] / 9


@pytest.mark.parametrize("schedule", [Constant(), InverseSqrt(timescale=30)])
def test_what_does_not_know_the_end_is_the_same_for_any_length(schedule: Schedule) -> None:
    assert [schedule(step, 5, 50) for step in range(50)] == [schedule(step, 5, 500) for step in range(50)]


@pytest.mark.parametrize("form", ["linear", "1-sqrt"])
def test_a_run_made_longer_before_its_decay_is_the_one_that_had_been_as_long(form: Any) -> None:
    schedule = WarmupStableDecay(decay=0.2, form=form, final_lr=0.0)
    assert [schedule(step, 5, 100) for step in range(81)] == [schedule(step, 5, 300) for step in range(81)]
    assert schedule(81, 5, 100) < 1 == schedule(240, 5, 300)


def test_the_decay_is_that_of_the_worked_example() -> None:
    """80 of 100 steps at most; then, of 20, a quarter is gone: 0.75 in a line, half by the root; towards 0.2."""
    linear, root = (WarmupStableDecay(decay=0.2, form=form, final_lr=0.2) for form in ("linear", "1-sqrt"))
    assert [linear(step, 10, 100) for step in (79, 80, 85, 100)] == pytest.approx([1, 1, 0.8, 0.2])
    assert [root(step, 10, 100) for step in (79, 80, 85, 100)] == pytest.approx([1, 1, 0.6, 0.2])


def test_a_decay_begins_after_the_warm_up() -> None:
    schedule = WarmupStableDecay(decay=0.9, form="linear", final_lr=0.0)
    assert [schedule(step, 50, 100) for step in (49, 50, 75, 100)] == pytest.approx([1, 1, 0.5, 0])


def test_the_inverse_square_root_is_that_of_the_transformer() -> None:
    """Vaswani et al. 2017, equation 3, whose steps count from 1."""
    for step in range(1, 200):
        wanted = min(step**-0.5, step * 20**-1.5) / 20**-0.5
        assert InverseSqrt(timescale=20)(step if step > 20 else step - 1, 20, 200) == pytest.approx(wanted)


def test_after_three_timescales_the_rate_is_a_half() -> None:
    assert InverseSqrt(timescale=30)(7 + 90, 7, 100) == pytest.approx(0.5)


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


def test_hidden_are_the_matrices_of_blocks() -> None:
    built = model()
    found = {id(p) for group in parameter_groups(built, ADAMW, {}) if group["hidden"] for p in group["params"]}
    wanted = {f"towers.{tower}.blocks.{block}.weight" for tower in ("image", "text") for block in (0, 1)}
    assert {name for name, p in built.named_parameters() if id(p) in found} == wanted


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


def some_weights() -> list[dict[str, Any]]:
    """Two hidden matrices, a group of others, and one that gets no gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = [[(6, 4), (4, 6)], [(5,), (3, 2, 2), (7, 3)], [(2, 2)]]
    made = [[nn.Parameter(torch.randn(shape, generator=generator)) for shape in some] for some in shapes]
    decays = (0.1, 0.0, 0.3)
    return [
        {"params": some, "lr": 0.5, "peak_lr": 0.5, "weight_decay": decay, "hidden": some is made[0]}
        for some, decay in zip(made, decays, strict=True)
    ]


def weights_of(groups: list[dict[str, Any]]) -> list[nn.Parameter]:
    return [p for group in groups for p in group["params"]]


def give_gradients(groups: list[dict[str, Any]], seed: int, spoilt: float | None = None) -> None:
    """To all but the last; the first of each may be spoilt."""
    generator = torch.Generator().manual_seed(seed)
    for p in weights_of(groups)[:-1]:
        p.grad = torch.randn(p.shape, generator=generator)
        if spoilt is not None:
            p.grad.view(-1)[0] = spoilt


def everything(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = {f"{k}": p.detach().clone() for k, p in enumerate(weights_of(optimizer.param_groups))}
    for place, state in optimizer.state_dict()["state"].items():
        found |= {f"{place}/{name}": value.clone() for name, value in state.items()}
    return found


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


@pytest.mark.parametrize("spoilt", [math.nan, math.inf])
@pytest.mark.parametrize("part", OPTIMIZERS, ids=lambda part: type(part).__name__)
def test_a_step_with_found_inf_leaves_everything_as_it_was_to_the_last_bit(part: Optimizer, spoilt: float) -> None:
    ours, theirs = (part.build(some_weights()) for _ in range(2))
    with torch.no_grad():
        for optimizer in (ours, theirs):
            weights_of(optimizer.param_groups)[0][0] = -0.0
    before = everything(ours)
    for seed in range(3):
        give_gradients(ours.param_groups, seed=99, spoilt=spoilt)
        ours.found_inf = torch.ones(())  # type: ignore[attr-defined]
        ours.step()
        after = everything(ours)
        assert {name: bits(after[name]) for name in before} == {name: bits(before[name]) for name in before}
        assert not any(after[name].any() for name in after.keys() - before.keys()), "a first step leaves zeros"
        for optimizer in (ours, theirs):
            give_gradients(optimizer.param_groups, seed)
            optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
            optimizer.step()
        before, wanted = everything(ours), everything(theirs)
        assert {name: bits(x) for name, x in before.items()} == {name: bits(x) for name, x in wanted.items()}
        assert not torch.equal(before["0"], after["0"])


class Reassigning(torch.optim.Optimizer):
    """Makes new tensors of state at each step."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                if p.grad is not None:
                    self.state[p]["mean"] = 0.5 * self.state[p].get("mean", torch.zeros_like(p)) + p.grad
                    p.sub_(self.state[p]["mean"])


def test_any_optimizer_can_heed_found_inf() -> None:
    groups = some_weights()[:1]
    optimizer = heeding_found_inf(Reassigning(groups, {}))
    for seed, found_inf in enumerate((1.0, 0.0, 1.0)):
        for p in weights_of(groups):
            p.grad = torch.full_like(p, math.nan if found_inf else seed)
        before = everything(optimizer)
        optimizer.found_inf = torch.tensor(found_inf)  # type: ignore[attr-defined]
        optimizer.step()
        after = everything(optimizer)
        assert all(x.isfinite().all() for x in after.values())
        assert all(torch.equal(before[name], after[name]) == bool(found_inf) for name in before)


def test_lion_is_that_of_the_paper() -> None:
    groups = some_weights()
    optimizer = Lion(lr=0.5, weight_decay=0.1, betas=(0.8, 0.95)).build(groups)
    wanted = [p.detach().clone() for p in weights_of(groups)]
    means = [torch.zeros_like(p) for p in wanted]
    for step in range(4):
        give_gradients(groups, step)
        for group in groups:
            group["lr"] = 0.5 / (step + 1)
        optimizer.step()
        decays = [group["weight_decay"] for group in groups for _ in group["params"]]
        for k, p in enumerate(weights_of(groups)[:-1]):
            assert p.grad is not None
            direction = torch.sign(0.8 * means[k] + (1 - 0.8) * p.grad)
            wanted[k] = wanted[k] - 0.5 / (step + 1) * (direction + decays[k] * wanted[k])
            means[k] = 0.95 * means[k] + (1 - 0.95) * p.grad
            torch.testing.assert_close(p.detach(), wanted[k])
            torch.testing.assert_close(optimizer.state[p]["exp_avg"], means[k])
    assert torch.equal(weights_of(groups)[-1], wanted[-1])


def test_muon_is_torch_s_for_hidden_matrices_and_adamw_for_the_rest() -> None:
    ours, (hidden, *others) = some_weights(), some_weights()
    part = Muon(lr=0.5, weight_decay=0.1, momentum=0.8, nesterov=False, ns_steps=3, betas=(0.5, 0.75), eps=0.125)
    joined = part.build(ours)
    muon = torch.optim.Muon([hidden], lr=0.5, momentum=0.8, nesterov=False, ns_steps=3, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=0.5, betas=(0.5, 0.75), eps=0.125, fused=True)
    for step in range(4):
        if step == 2:
            stored, joined = joined.state_dict(), part.build(ours)
            joined.load_state_dict(stored)
        for some in (joined.param_groups, [hidden, *others]):
            give_gradients(some, step)
            for group in some:
                group["lr"] = group["peak_lr"] / (step + 1)
        for optimizer in (joined, muon, adamw):
            optimizer.step()
        assert all(map(torch.equal, weights_of(joined.param_groups), weights_of([hidden, *others])))


def test_a_step_of_muon_is_about_as_large_as_one_of_adamw() -> None:
    """The root mean square of Adam's is 0.2 to 0.4 in practice; one rate serves both then."""
    for shape in ((64, 64), (256, 64), (64, 256)):
        weight = nn.Parameter(torch.zeros(shape))
        optimizer = MUON.build([{"params": [weight], "lr": 1.0, "weight_decay": 0.0, "hidden": True}])
        weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        optimizer.step()
        assert weight.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.3)


@pytest.mark.parametrize("hidden", [True, False])
def test_muon_may_have_only_hidden_matrices_or_none(hidden: bool) -> None:
    groups = some_weights()[:1] if hidden else some_weights()[1:]
    optimizer = MUON.build(groups)
    before = [p.detach().clone() for p in weights_of(groups)]
    for p in weights_of(groups):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not any(map(torch.equal, before, weights_of(groups)))
