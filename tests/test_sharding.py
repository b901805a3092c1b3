"""Ranks that hold parts of the weights compute what one process computes that holds all of them."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import TINY, TinyConfig, composed
from numpy.typing import NDArray
from safetensors.torch import load_file
from test_hf_families import part
from test_micro_batches import InfoNCEInTiles
from test_ranks import IMAGE, SECTION, mine, on_ranks
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from multimodal import checkpoint, distributed, memory
from multimodal.batch import Batch, Features
from multimodal.compiling import compile_towers
from multimodal.config import ConfigError, TrainConfig, changed_identity, check
from multimodal.data.augment import Keep
from multimodal.data.loader import Reader
from multimodal.dry_run import dry_run
from multimodal.ema import Ema
from multimodal.encoder import Encoder
from multimodal.losses.infonce import InfoNCE
from multimodal.losses.sigmoid import Sigmoid
from multimodal.model import Model
from multimodal.optim import AdamW, parameter_groups
from multimodal.optimizers.lion import Lion
from multimodal.parts import Loss, Optimizer, Tuning
from multimodal.sharding import _blocks, shard
from multimodal.step import training_step
from multimodal.towers.images import ImageTower
from multimodal.towers.resnet import ResNet
from multimodal.towers.vit import ViT
from multimodal.trainer import Trainer

CPU = torch.device("cpu")
FP32, BF16 = (torch.autocast("cpu", torch.bfloat16, enabled=enabled, cache_enabled=False) for enabled in (False, True))
ROWS, STEPS, BROKEN = 24, 5, 2
VIT = ViT(**IMAGE, image_size=32, patch_size=16, width=16, layers=3, mlp_ratio=2.0, pool="tok", patch_dropout=0.0)
ADAMW = AdamW(lr=1e-3, weight_decay=0.1, betas=(0.9, 0.98), eps=1e-8)
LION = Lion(lr=1e-4, weight_decay=0.1, betas=(0.9, 0.99))
PAIR = ("x", "y")


class NotFinite(InfoNCE):
    """What a loss is when something went wrong."""

    def __call__(self, features: Features) -> Tensor:
        return super().__call__(features) * torch.nan


class Case(NamedTuple):
    """How two image towers are trained on two views of random images."""

    tower: ImageTower = VIT
    loss: Loss = InfoNCE(pair=PAIR)
    optimizer: Optimizer = ADAMW
    micro_batch_size: int | None = None
    tuning: Tuning = Tuning()
    """Of the second tower."""
    first: Tuning = Tuning()
    logit_bias: float | None = None
    context: torch.autocast = FP32


NO_BIAS = Tuning(frozen_names=("*.in_proj_bias",))
"""A bias of keys changes nothing: its gradient is rounding, of which Lion takes the sign."""
CHECKPOINTED = VIT.model_copy(update={"grad_checkpointing": True})
CASES = {
    "whole batch": Case(),
    "micro-batches": Case(micro_batch_size=5),
    "checkpointed": Case(CHECKPOINTED, micro_batch_size=5),
    "checkpointed whole": Case(CHECKPOINTED),
    "locked": Case(tuning=Tuning(frozen="tower"), micro_batch_size=5),
    "partly frozen": Case(tuning=Tuning(frozen="tower", unfrozen_blocks=1, layer_decay=0.5)),
    "wholly frozen": Case(tuning=Tuning(frozen="all"), micro_batch_size=5),
    "lion": Case(optimizer=LION, tuning=NO_BIAS, first=NO_BIAS, micro_batch_size=4),
    "sigmoid": Case(loss=Sigmoid(pair=PAIR), micro_batch_size=5, logit_bias=-2.0),
    "batch norm": Case(ResNet(**IMAGE, image_size=32, layers=(1, 1, 1, 1), width=4)),
}


CASE_BF16 = Case(CHECKPOINTED, micro_batch_size=5, context=BF16)


class Trained(NamedTuple):
    """What is left of some steps of training."""

    files: dict[str, dict[str, NDArray[Any]]]
    measured: list[dict[str, float]]
    held: float
    """The share of weights, optimizer state and running mean that this rank holds."""


class Run:
    """A model and all that goes with it, in float64."""

    def __init__(self, case: Case, sharded: bool) -> None:
        torch.manual_seed(0)
        towers = {
            name: case.tower.build(case.tower.preprocessor(list, Keep(), None), SECTION.embed_dim) for name in PAIR
        }
        self.model = Model(towers, SECTION.model_copy(update={"logit_bias": case.logit_bias}))
        if case.context is FP32:
            self.model.double()
        tunings = {"x": case.first, "y": case.tuning}
        self.model.freeze(tunings)
        self.model.train()
        if sharded:
            shard(self.model, CPU)
        self.optimizer = case.optimizer.build(parameter_groups(self.model, case.optimizer, tunings))
        self.ema = Ema(self.model, 0.9)
        self.case = case

    def train(self, images: Tensor) -> Trained:
        measured = []
        for step, (x, y) in enumerate(images):
            batch = Batch({"x": mine(x), "y": mine(y)}, torch.arange(len(mine(x))))
            losses = {"loss": NotFinite(pair=PAIR) if step == BROKEN else self.case.loss}
            size = self.case.micro_batch_size
            found = training_step(self.model, losses, self.optimizer, batch, self.case.context, 0.5, size, (0, step))
            self.ema.update(found["updated"])
            measured.append({name: float(value) for name, value in found.items() if name != "finite_rows"})
        states = [x for state in self.optimizer.state.values() for x in state.values() if x.ndim]
        tensors = [*self.model.parameters(), *self.ema.means, *states]
        held = sum(distributed.local(x).numel() for x in tensors) / sum(x.numel() for x in tensors)
        files = checkpoint.whole_tensors(self.ema, self.optimizer)
        arrays = {file: {key: x.numpy() for key, x in tensors.items()} for file, tensors in files.items()}
        return Trained(arrays, measured, held)


def slow(test: Callable[..., None]) -> Callable[..., None]:
    """Starts processes, which takes long where others are busy."""
    return pytest.mark.slow(pytest.mark.timeout(900)(test))


def _images(case: Case) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    size = STEPS, 2, ROWS, 3, case.tower.image_size, case.tower.image_size
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)


class _AsItIs:
    """A preprocessor of what is ready for a tower."""

    def __call__(self, value: Tensor, rng: Random | None) -> Tensor:
        return value


def _encoded(sharded: bool) -> list[Any]:
    """Features of some rows before and after a step; some ranks have fewer batches than others, or none."""
    run = Run(Case(), sharded)
    images = _images(Case())[:1]
    encoder = Encoder(run.model, {"x": Reader("image", _AsItIs())}, FP32, batch_size=1)  # type: ignore[arg-type]
    numbers = 1, 2 * distributed.world_size() - 1
    before = [encoder.encode("x", list(images[0, 0, :n])).tolist() for n in numbers]
    run.train(images)
    return [before, [encoder.encode("x", list(images[0, 0, :n])).tolist() for n in numbers]]


def _that_fits() -> list[int]:
    """The micro-batches that are found by ranks with different memory; and how many gradients are left behind."""
    run = Run(Case(), sharded=True)
    x, y = (view.repeat(40, 1, 1, 1) for view in _images(Case())[0])
    batch = Batch({"x": x, "y": y}, torch.arange(len(x)))
    found, losses = [], {"loss": InfoNCEInTiles(pair=PAIR, tile=16)}
    with pytest.MonkeyPatch.context() as patch:
        for free in (12e6, 25e6, 1e9):
            patch.setattr(memory, "free_bytes", lambda _, free=free: int(free * (1 + distributed.rank())))
            found.append(memory.micro_batch_that_fits(run.model, losses, batch, FP32))
    return [*found, sum(p.grad is not None for p in run.model.parameters())]


class Reductions(TorchDispatchMode):
    """Counts how often gradients are averaged over ranks and cut."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "reduce_scatter" in str(func)
        return func(*args, **(kwargs or {}))


def _reductions(micro_batch_size: int | None) -> int:
    """In a step."""
    run = Run(Case(micro_batch_size=micro_batch_size), sharded=True)
    with Reductions() as reductions:
        run.train(_images(Case())[:1])
    return reductions.count


class OnARank(NamedTuple):
    """What a rank found, by whether weights were sharded."""

    trained: dict[tuple[str, bool], Trained]
    encoded: dict[bool, list[Any]]
    fits: list[int]
    reductions: list[int]
    in_bf16: list[Trained]


def _on_a_rank() -> OnARank:
    trained = {
        (name, sharded): Run(case, sharded).train(_images(case))
        for name, case in CASES.items()
        for sharded in (False, True)
    }
    encoded = {sharded: _encoded(sharded) for sharded in (False, True)}
    in_bf16 = [Run(CASE_BF16, sharded).train(_images(CASE_BF16)) for sharded in (False, True)]
    return OnARank(trained, encoded, _that_fits(), [_reductions(size) for size in (None, 1, 5)], in_bf16)


@pytest.fixture(scope="module", params=[2, 4])
def on_each_rank(request: pytest.FixtureRequest) -> list[OnARank]:
    """All that several ranks are asked, from one start of processes, which takes longer than all of it."""
    return on_ranks(request.param, _on_a_rank)


@slow
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_ranks_train_as_one_process_does(on_each_rank: list[OnARank], name: str, sharded: bool) -> None:
    expected = Run(CASES[name], sharded=False).train(_images(CASES[name]))
    found = [one.trained[name, sharded] for one in on_each_rank]
    assert found[0].files.keys() == expected.files.keys() == {f"{k}.safetensors" for k in ("model", "ema", "optimizer")}
    for file, arrays in expected.files.items():
        assert found[0].files[file].keys() == arrays.keys()
        for key, value in arrays.items():
            np.testing.assert_allclose(found[0].files[file][key], value, rtol=0, atol=1e-10, err_msg=f"{file} {key}")
    for one in found:
        for step, (ours, theirs) in enumerate(zip(one.measured, expected.measured, strict=True)):
            assert ours["finite"] == (step != BROKEN)
            for key in theirs.keys() & ours.keys():
                assert ours[key] == pytest.approx(theirs[key], rel=0, abs=1e-10, nan_ok=True), (step, key)


@slow
def test_in_bf16_sharding_leaves_the_numbers_of_the_same_ranks(on_each_rank: list[OnARank]) -> None:
    replicated, sharded = on_each_rank[0].in_bf16
    for file, arrays in replicated.files.items():
        for key, value in arrays.items():
            np.testing.assert_allclose(sharded.files[file][key], value, rtol=0, atol=1e-5, err_msg=f"{file} {key}")


def _compiled() -> tuple[list[list[Trained]], int]:
    """Sharded, as it is and compiled, by case."""
    found = []
    for case in (CASES["whole batch"], CASES["checkpointed"]):
        plain, compiled = (Run(case, sharded=True) for _ in range(2))
        compile_towers(compiled.model)
        found.append([run.train(_images(case)) for run in (plain, compiled)])
    return found, len(torch._dynamo.utils.compile_times(repr="csv")[0])


@slow
def test_compiled_towers_whose_weights_are_sharded_compute_the_same() -> None:
    for found, functions in on_ranks(2, _compiled):
        assert functions, "something was compiled"
        for plain, compiled in found:
            for file, arrays in plain.files.items():
                for key, value in arrays.items():
                    np.testing.assert_allclose(compiled.files[file][key], value, rtol=0, atol=1e-10, err_msg=key)
            for step, (ours, theirs) in enumerate(zip(compiled.measured, plain.measured, strict=True)):
                assert ours["updated"] == (step != BROKEN)
                assert ours == pytest.approx(theirs, rel=0, abs=1e-10, nan_ok=True)


@slow
def test_micro_batches_average_gradients_as_often_as_the_whole_batch(on_each_rank: list[OnARank]) -> None:
    for one in on_each_rank:
        assert set(one.reductions) == {2 * (VIT.layers + 2)}  # blocks, projection and the rest, of two towers


@slow
def test_a_rank_holds_its_part(on_each_rank: list[OnARank]) -> None:
    for one in on_each_rank:
        for (name, sharded), trained in one.trained.items():
            assert trained.held < 1.1 / len(on_each_rank) if sharded else trained.held == 1, name


@slow
def test_each_rank_encodes_as_many_batches_as_it_has(on_each_rank: list[OnARank]) -> None:
    for one in on_each_rank:
        for whole, sharded in zip(one.encoded[False], one.encoded[True], strict=True):
            for ours, theirs in zip(sharded, whole, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)  # features are in float32
        assert one.encoded == on_each_rank[0].encoded


@slow
def test_ranks_with_different_memory_find_one_micro_batch(on_each_rank: list[OnARank]) -> None:
    for one in on_each_rank:
        less, more, most, gradients = one.fits
        assert 2 < less < more < most == 40 * ROWS
        assert gradients == 0
        assert one.fits == on_each_rank[0].fits


# --- runs ------------------------------------------------------------------------------------------------------------

WAYS: dict[str, tuple[tuple[int, str, int], ...]] = {
    "whole": ((1, "none", 6),),
    "on-off-on": ((2, "full", 2), (4, "none", 4), (1, "full", 6)),
    "off-on-off": ((2, "none", 2), (4, "full", 4), (1, "none", 6)),
    "fewer": ((4, "full", 3), (2, "full", 6)),
    "tuned-whole": ((1, "none", 6),),
    "tuned-sharded": ((2, "full", 3), (4, "full", 6)),
}
"""Ranks, sharding and the step to which, of runs that are continued; tuned ones begin with weights of the first."""
TRAINER = (
    *(word for word in TINY if not word.startswith(("evals", "duration", "log"))),
    *("evals=[shapes]", "evals.shapes.dataset.size=80", "evals.shapes.every=never", "log.every=1steps"),
    *("schedule=constant", "warmup=1steps", "ema.decay=0.9", "micro_batch_size=3", "model.logit_bias=-1.0"),
    *(
        "towers.image.grad_checkpointing=true",
        "towers.text.tuning.frozen=tower",
        "towers.text.tuning.unfrozen_blocks=1",
    ),
)


def _go_the_ways(rank: int, folder: str, raw: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    for name, way in WAYS.items():
        torch.set_default_dtype(torch.float32 if name.startswith("tuned") else torch.float64)  # as kept features are
        for ranks, sharding, last in way:
            if rank < ranks:
                if ranks > 1:
                    meeting = f"file://{folder}/{name}-{last}"
                    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks)
                changed = copy.deepcopy(raw) | {"sharding": sharding, "duration": f"{last}steps"}
                changed["run"]["name"] = name
                if name.startswith("tuned"):
                    changed["init"]["weights"] = "whole"
                    changed["towers"]["image"]["tuning"] |= {"frozen": "tower", "keep_features": True}
                Trainer(check(changed, TrainConfig)).run()


@slow
def test_a_run_goes_on_with_any_number_of_ranks_and_with_or_without_sharding(tmp_path: Path) -> None:
    raw = composed(*TRAINER, f"paths.runs={tmp_path}")
    mp.spawn(_go_the_ways, (str(tmp_path), raw), nprocs=4)
    logs: dict[str, list[dict[str, float]]] = {}
    for name in WAYS:
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        logs[name] = [row for row in lines if "train/loss" in row] + lines[-1:]
        assert [row["step"] for row in logs[name]] == [1, 2, 3, 4, 5, 6, 6]
        other, allowed = ("tuned-whole", 1e-4) if name.startswith("tuned") else ("whole", 1e-10)
        for ours, theirs in zip(logs[name], logs[other], strict=True):
            assert ours.keys() == theirs.keys()
            for key in ours.keys() - {"train/samples_per_s", "train/data_wait", "train/replay_error"}:
                assert ours[key] == pytest.approx(theirs[key], rel=0, abs=allowed), (name, ours["step"], key)
        folders = [checkpoint.step_folder(tmp_path / run, 6) for run in (name, other)]
        for file in ("model", "ema", "optimizer"):
            ours, theirs = (load_file(folder / f"{file}.safetensors") for folder in folders)
            assert ours.keys() == theirs.keys()
            for key, value in theirs.items():
                torch.testing.assert_close(ours[key], value, rtol=0, atol=allowed)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("pool", ["tok", "avg"])
def test_every_block_of_a_tower_is_found(layers: int, pool: str) -> None:
    tower = VIT.model_copy(update={"layers": layers, "pool": pool})
    built = tower.build(tower.preprocessor(list, Keep(), None), SECTION.embed_dim)
    for container in (nn.ModuleList, lambda blocks: nn.Sequential(*blocks)):  # may be iterated rather than called
        built.net.transformer.resblocks = container(list(built.net.transformer.resblocks))
        found = list(_blocks(built))
        assert not any(isinstance(module, nn.ModuleList | nn.Sequential) for module in found)
        for module, block in zip(found, built.net.transformer.resblocks, strict=True):
            assert [id(p) for p in module.parameters()] == [id(p) for p in block.parameters()]


def test_sharding_may_change_when_a_run_goes_on_and_old_runs_had_none(tiny_raw: dict[str, Any]) -> None:
    sharded = check({**tiny_raw, "sharding": "full"}, TrainConfig)
    assert changed_identity(tiny_raw, sharded) == []
    del tiny_raw["sharding"]
    assert check(tiny_raw, TrainConfig).sharding == "none"


def test_an_optimizer_of_whole_matrices_is_refused(tiny_config: TinyConfig) -> None:
    with pytest.raises(ConfigError, match="sharding: Muon updates whole matrices"):
        tiny_config("optimizer=muon", "sharding=full")


def test_scaled_gradients_in_parts_are_refused(tiny_config: TinyConfig) -> None:
    with pytest.raises(ConfigError, match=r"1 problem.*\n  sharding: the scaling of gradients that fp16 needs"):
        tiny_config("precision=fp16", "sharding=full")


@pytest.mark.parametrize(("kind", "share"), [("m2m_100", 0.1), ("mbart", 0.1), ("bart", 0.1), ("bart", 0.0)])
def test_a_tower_that_leaves_out_blocks_at_random_is_refused(
    kind: str, share: float, tmp_path: Path, tiny_config: TinyConfig
) -> None:
    text = part(kind, tmp_path, {"encoder_layerdrop": share})
    config = tiny_config("sharding=full")
    config = config.model_copy(update={"towers": {**config.towers, "text": text}})
    locked = text.model_copy(update={"tuning": Tuning(frozen="tower")})
    frozen = config.model_copy(update={"towers": {**config.towers, "text": locked}})
    whole = config.model_copy(update={"sharding": "none"})
    for allowed in (frozen, whole, *([] if share else [config])):
        dry_run(allowed)
    if share:
        for refused in (dry_run, lambda config: Trainer(config).run()):
            with pytest.raises(ConfigError, match=r"towers\.text: sharding=full needs .* leaves out 0\.1 of them"):
                refused(config)
