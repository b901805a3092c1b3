"""The laws of one step."""

import copy
import math
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from test_one_token import captions, pixels, text, vit
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from multimodal.assemble import Assembled
from multimodal.batch import Batch, Features
from multimodal.config import ModelSection
from multimodal.losses import logsumexp
from multimodal.losses.infonce import InfoNCE
from multimodal.losses.sigmoid import Sigmoid
from multimodal.model import Model
from multimodal.optim import AdamW, parameter_groups
from multimodal.optimizers.lion import Lion
from multimodal.optimizers.muon import Muon
from multimodal.parts import Loss, TowerModule
from multimodal.step import kernels, training_step

ROWS, INPUTS = 6, 5
FP32, BF16 = (torch.autocast("cpu", torch.bfloat16, enabled=enabled) for enabled in (False, True))
LOSSES = {"infonce": InfoNCE()}
LR, DECAY, BETAS, EPS = 0.05, 0.2, (0.9, 0.98), 1e-6


class Small(TowerModule):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 4
        self.net = nn.Sequential(nn.Linear(INPUTS, 7), nn.GELU(), nn.Linear(7, self.width))
        self.projection = nn.Linear(self.width, 3, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        features: Tensor = self.net(inputs)
        return features

    def depths(self) -> list[list[nn.Parameter]]:
        return [[], *(list(self.net[k].parameters()) for k in (0, 2))]


def small_model(**changes: Any) -> Model:
    torch.manual_seed(0)
    section = {"embed_dim": 3, "logit_scale": 10.0, "max_logit_scale": 100.0, "learn_logit_scale": True}
    return Model(
        {"image": Small(), "text": Small()}, ModelSection(**{**section, "logit_bias": None, **changes})
    ).double()


def batch(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    inputs = {k: torch.randn(ROWS, INPUTS, dtype=torch.float64, generator=generator) for k in ("image", "text")}
    return Batch(inputs, torch.arange(ROWS))


def adamw(model: Model, lr: float = LR) -> torch.optim.Optimizer:
    part = AdamW(lr=lr, weight_decay=DECAY, betas=BETAS, eps=EPS)
    return part.build(parameter_groups(model, part, {}))


def lion(model: Model) -> torch.optim.Optimizer:
    part = Lion(lr=LR, weight_decay=DECAY, betas=BETAS)
    return part.build(parameter_groups(model, part, {}))


def muon(model: Model) -> torch.optim.Optimizer:
    part = Muon(lr=LR, weight_decay=DECAY, momentum=0.95, nesterov=True, ns_steps=5, betas=BETAS, eps=EPS)
    return part.build(parameter_groups(model, part, {}))


Build = Callable[[Model], torch.optim.Optimizer]


def step(
    model: Model,
    optimizer: torch.optim.Optimizer,
    data: Batch,
    losses: Mapping[str, Loss] = LOSSES,
    max_grad_norm: float | None = None,
) -> dict[str, float]:
    measured = training_step(model, losses, optimizer, data, FP32, max_grad_norm, None, (0, 0))
    return {name: float(value) for name, value in measured.items() if value.ndim == 0}


def by_hand(model: Model, optimizer: torch.optim.Optimizer, data: Batch, max_grad_norm: float | None) -> float:
    """The step in plain torch, by the formula of the paper."""
    optimizer.zero_grad()
    x, y = (
        F.normalize(model.towers[k](data.inputs[k]) @ model.towers[k].projection.weight.T, dim=-1)  # type: ignore[union-attr,operator]
        for k in ("image", "text")
    )
    logits = model.logit_scale.exp() * x @ y.T
    labels = torch.arange(ROWS)
    loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    loss.backward()
    if max_grad_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("max_grad_norm", [None, 0.1, 1e6])
def test_a_step_is_the_step_written_by_hand(max_grad_norm: float | None) -> None:
    ours, theirs = small_model(), small_model()
    optimizer = adamw(ours)
    groups = [{**group, "fused": False, "foreach": False} for group in adamw(theirs).param_groups]
    plain = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, fused=False, foreach=False)
    before = copy.deepcopy(ours.state_dict())
    for number in range(3):
        measured = step(ours, optimizer, batch(number), max_grad_norm=max_grad_norm)
        assert measured["loss"] == pytest.approx(by_hand(theirs, plain, batch(number), max_grad_norm), abs=1e-12)
        assert measured["finite"] == 1
    for name, weights in ours.state_dict().items():
        torch.testing.assert_close(weights, theirs.state_dict()[name], rtol=0, atol=1e-10)
        assert not torch.equal(weights, before[name])


class Spoilt(Loss):
    """A term of value 0 whose gradient is not finite, as of a root at 0."""

    weight: float = 1.0

    def needs(self) -> frozenset[str]:
        return frozenset({"image_features"})

    def __call__(self, features: Features) -> Tensor:
        return (features.tensors["image_features"].sum() * 0).sqrt()


def snapshot(model: Model, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    flat = {f"{place}/{name}": value for place, entries in state.items() for name, value in entries.items()}
    return copy.deepcopy({**model.state_dict(), **flat})


@pytest.mark.parametrize("spoil", ["input", "gradient"])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("build", [adamw, lion, muon])
def test_a_step_that_is_not_finite_changes_neither_weights_nor_optimizer(
    spoil: str, max_grad_norm: float | None, build: Build
) -> None:
    model = small_model()
    optimizer = build(model)
    step(model, optimizer, batch(), max_grad_norm=max_grad_norm)
    before = snapshot(model, optimizer)
    data, losses = batch(1), dict[str, Loss](LOSSES)
    if spoil == "input":
        data.inputs["text"][0, 0] = torch.nan
    else:
        losses["spoilt"] = Spoilt()
    measured = step(model, optimizer, data, losses, max_grad_norm)
    assert measured["finite"] == measured["updated"] == 0
    assert math.isfinite(measured["loss"]) == (spoil == "gradient")
    after = snapshot(model, optimizer)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)

    other = small_model()
    other_optimizer = build(other)
    for number in (0, 2):
        step(other, other_optimizer, batch(number), max_grad_norm=max_grad_norm)
    step(model, optimizer, batch(2), max_grad_norm=max_grad_norm)
    for name, value in snapshot(model, optimizer).items():
        assert torch.equal(value, snapshot(other, other_optimizer)[name]), "the step after it is as if it had not been"


@pytest.mark.parametrize("build", [adamw, lion, muon])
def test_a_first_step_that_is_not_finite_leaves_the_weights(build: Build) -> None:
    model = small_model()
    before = copy.deepcopy(model.state_dict())
    data = batch()
    data.inputs["image"][:] = torch.inf
    assert step(model, build(model), data)["finite"] == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Recorder(torch.optim.SGD):
    """Remembers the norm of the gradients that it is given."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        self.norm = torch.cat([grad.flatten() for grad in grads]).norm().item()
        self.scale_grad = grads[-1].clone()


def test_clipping_bounds_the_global_norm_and_keeps_the_direction() -> None:
    model = small_model()
    free, clipped = (Recorder(model.parameters(), lr=1) for _ in range(2))
    measured = [step(model, free, batch()), step(model, clipped, batch(), max_grad_norm=0.01)]
    assert free.norm > 0.1
    assert clipped.norm == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close(clipped.scale_grad / clipped.norm, free.scale_grad / free.norm)
    assert measured[0] == measured[1], "what is logged is the norm before clipping"
    assert measured[0]["grad_norm"] == pytest.approx(free.norm)


def test_small_gradients_are_not_scaled_up() -> None:
    model = small_model()
    recorder = Recorder(model.parameters(), lr=1)
    measured = step(model, recorder, batch(), max_grad_norm=1e6)
    assert recorder.norm == pytest.approx(measured["grad_norm"])


def test_the_norm_of_each_tower_is_logged() -> None:
    model = small_model()
    measured = step(model, Recorder(model.parameters(), lr=1), batch())
    squares = measured["grad_norm/image"] ** 2 + measured["grad_norm/text"] ** 2
    assert 0 < squares < measured["grad_norm"] ** 2


@pytest.mark.parametrize("limit", [20.0, 1e6])
def test_the_scale_stays_at_or_below_its_limit(limit: float) -> None:
    model = small_model(logit_scale=20.0, max_logit_scale=limit)
    with torch.no_grad():
        model.towers["text"].load_state_dict(model.towers["image"].state_dict())
    data = batch()
    aligned = Batch({"image": data.inputs["image"], "text": data.inputs["image"]}, data.indices)
    scale = step(model, adamw(model, lr=0.3), aligned)["logit_scale"]
    assert scale == pytest.approx(20.0) if limit == 20.0 else scale > 25


def test_a_scale_that_is_not_learnt_stays() -> None:
    model = small_model(learn_logit_scale=False)
    assert step(model, adamw(model), batch())["logit_scale"] == pytest.approx(10, abs=1e-6)


def test_terms_add_up_by_their_weights() -> None:
    one = step(small_model(), adamw(small_model()), batch())
    terms = {"a": InfoNCE(weight=0.5), "b": InfoNCE(weight=2.0)}
    both = step(small_model(), adamw(small_model()), batch(), terms)
    assert both["loss"] == pytest.approx(2.5 * one["loss"])
    assert both["loss/a"] == both["loss/b"] == pytest.approx(one["loss"])
    assert both["grad_norm"] == pytest.approx(2.5 * one["grad_norm"])
    assert "loss/infonce" not in one


def test_a_step_leaves_no_gradient_behind() -> None:
    model = small_model()
    step(model, adamw(model), batch())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_precision_says_whether_towers_run_in_bf16() -> None:
    x = torch.ones(2, 2)
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        with Assembled({}, small_model().float(), precision).context:
            assert (x @ x).dtype == dtype


def test_features_and_loss_are_float32_where_towers_run_in_bf16() -> None:
    model = small_model().float()
    seen: list[torch.dtype] = []

    class Looks(InfoNCE):
        def __call__(self, features: Features) -> Tensor:
            seen.extend(x.dtype for x in features.tensors.values())
            return super().__call__(features)

    data = Batch({name: x.float() for name, x in batch().inputs.items()}, batch().indices)
    measured = training_step(model, {"a": Looks()}, adamw(model), data, BF16, 1.0, None, (0, 0))
    assert not torch.is_autocast_enabled("cpu"), "it ends with the towers"
    assert seen == [torch.float32] * 2
    assert measured["loss"].dtype == torch.float32


class Ops(TorchDispatchMode):
    """The names of what is computed while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize("grad_checkpointing", [False, True])
def test_in_bf16_on_a_cpu_attention_is_not_that_whose_backward_pass_is_slow(
    size: int | None, grad_checkpointing: bool
) -> None:
    fused = {}
    for name, context in (("fp32", FP32), ("bf16", BF16)):
        towers = {"image": vit(grad_checkpointing=grad_checkpointing), "text": text(causal=False)}
        section = {"embed_dim": 8, "logit_scale": 10.0, "max_logit_scale": 100.0, "learn_logit_scale": True}
        model = Model(towers, ModelSection(**section, logit_bias=None)).train()
        inputs = {"image": pixels(), "text": captions()[:4]}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0, fused=True)
        with Ops() as ops:
            measured = training_step(
                model, LOSSES, optimizer, Batch(inputs, torch.arange(4)), context, None, size, (0, 0)
            )
        assert measured["finite"] == 1
        fused[name] = any("flash_attention" in op for op in ops.names)
        assert torch.backends.cuda.flash_sdp_enabled()
    assert fused == {"fp32": True, "bf16": False}


# --- TF32 -------------------------------------------------------------------------------------------------------------

ON_A_GPU = torch.autocast("cuda", torch.bfloat16, enabled=False)
"""What is asked for there; flags can be set where there is none."""


def tf32() -> bool:
    return torch.backends.cuda.matmul.allow_tf32


def test_towers_multiply_in_tf32_on_a_gpu_and_flags_are_as_before_behind_them() -> None:
    for before in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = before
        try:
            with kernels(FP32):
                assert tf32() == before
            with kernels(ON_A_GPU):
                assert tf32()
            assert tf32() == before
            with pytest.raises(ZeroDivisionError), kernels(ON_A_GPU):
                raise ZeroDivisionError
            assert tf32() == before
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("context", [FP32, ON_A_GPU])
def test_in_a_step_towers_may_multiply_in_tf32_and_losses_never_do(size: int | None, context: torch.autocast) -> None:
    seen: dict[str, set[bool]] = {}

    class Noting(torch.autograd.Function):
        """The same tensor; notes the flag on both ways."""

        @staticmethod
        def forward(ctx: Any, x: Tensor, where: str) -> Tensor:
            ctx.where = where
            seen.setdefault(f"{where}, there", set()).add(tf32())
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            seen.setdefault(f"{ctx.where}, back", set()).add(tf32())
            return grad, None

    class Noted(InfoNCE):
        def __call__(self, features: Features) -> Tensor:
            loss: Tensor = Noting.apply(super().__call__(features), "loss")
            return loss

    model = small_model()
    for tower in model.towers.values():
        tower.net.register_forward_hook(lambda *call: Noting.apply(call[-1], "tower"))  # type: ignore[union-attr,operator]
    training_step(model, {"infonce": Noted()}, adamw(model), batch(), context, 1.0, size, (0, 0))
    on = context is ON_A_GPU
    assert seen == {"tower, there": {on}, "tower, back": {on}, "loss, there": {False}, "loss, back": {False}}
    assert not tf32()


# --- nothing waits for the device -------------------------------------------------------------------------------------

READS = frozenset(
    f"aten.{name}"
    for name in (
        "_local_scalar_dense",
        "item",
        "is_nonzero",
        "equal",
        "nonzero",
        "masked_select",
        "_unique2",
        "unique_dim",
    )
)
"""What a device is asked for, a value or how many there are; copies from one device to another cannot be seen here."""


class Reads(TorchDispatchMode):
    """Counts questions about values, by whether the losses ask them or somebody else.

    Losses ask where `_answers_at_once`, which is never on a GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.of_losses, self.others = 0, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = [x for x in tree_leaves(args[1:]) if isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8)]
        if str(func.overloadpacket) in READS or (str(func).startswith("aten.index") and masks):
            asking = {frame.name for frame in traceback.extract_stack()}
            if asking & {"_add_together", "_weights_together"}:
                self.of_losses += 1
            else:
                self.others.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize("build", [adamw, lion, muon])
def test_nothing_on_the_way_of_a_step_waits_for_the_device(
    build: Build, size: int | None, with_lengths: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    towers = {"image": vit(patch_dropout=0.5, drop_path=0.5), "text": text(drop_path=0.5)}
    section = {"embed_dim": 8, "logit_scale": 10.0, "max_logit_scale": 100.0, "learn_logit_scale": True}
    model = Model(towers, ModelSection(**section, logit_bias=-10.0)).train()
    inputs = {"image": pixels(), "text": captions()[:4]}
    lengths = model.lengths(inputs) if with_lengths else {}
    assert len(lengths) == with_lengths
    data = Batch(inputs, torch.arange(4), ids={"caption": torch.tensor([0, 1, 0, 2])}, lengths=lengths)
    kinds: tuple[Literal["positive", "masked"], ...] = ("positive", "masked")
    losses: dict[str, Loss] = {"infonce": InfoNCE(), "sigmoid": Sigmoid()}
    losses |= {f"infonce {kind}": InfoNCE(duplicates=kind, label_smoothing=0.1) for kind in kinds}
    losses |= {f"sigmoid {kind}": Sigmoid(duplicates=kind) for kind in kinds}
    optimizer = build(model)
    for on_a_gpu in (False, True):
        if on_a_gpu:
            monkeypatch.setattr(logsumexp, "_answers_at_once", lambda x: False)
        with Reads() as reads:
            measured = training_step(model, losses, optimizer, data, FP32, 1.0, size, (0, 0))
        assert measured["updated"] == 1
        assert reads.others == []
        assert (reads.of_losses == 0) == on_a_gpu
