"""A training step without the machine for it: tensors have shapes and no memory, and the other ranks are not there.

The step is the trainer's own: what towers skip, a frozen tower's missing backward pass, micro-batches and checkpointed
blocks are in the numbers because they are in the step. Nothing here knows what a tower is made of.

Tensors say that they are on a CPU (torch's fake tensors), so that operators are chosen as there, attention without its
matrix among them, as on GPUs. With `cuda`, norms are in float32, as autocast has them there.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from multimodal import distributed
from multimodal.batch import Batch, Features
from multimodal.config import TrainConfig
from multimodal.memory import Peak
from multimodal.model import Model
from multimodal.optim import parameter_groups
from multimodal.parts import Loss, TowerModule
from multimodal.step import objective, training_step
from multimodal.towers.images import ImageEncoder
from multimodal.towers.text_transformer import TextTransformerEncoder


@dataclass(frozen=True)
class Taken:
    """What something takes while it runs."""

    peak: int
    """Most bytes at one time, beside what is there before."""
    flops: int
    """Multiplications and additions of products and convolutions, as torch counts them: 2 for each pair."""


@dataclass(frozen=True)
class Resident:
    """Bytes that are there all the time, on a rank that holds all of them."""

    weights: int
    """With buffers."""
    gradients: int
    """From the backward pass to the update."""
    optimizer: int
    """Its state."""
    mean: int
    """Of the weights that are trained, if one is kept."""
    largest_block: int
    """Weights of a tower's largest block."""


class Rehearsal:
    """A model of `assemble_outline` and its optimizer, to be stepped as often as one likes."""

    def __init__(
        self,
        model: Model,  # on the meta device; changed
        config: TrainConfig,
        inputs: Mapping[str, Tensor],  # by tower, [...] one sample's, as preprocessed
        precision: Literal["fp32", "bf16", "fp16"],  # the last takes what bf16 takes
        device: Literal["cuda", "cpu"],
        ranks: int,
    ) -> None:
        self.model, self.config, self.inputs, self.ranks = model, config, inputs, ranks
        self.context = torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32")
        self.on_gpu = device == "cuda" and precision != "fp32"
        self.fake = FakeTensorMode()
        tunings = {name: tower.tuning for name, tower in config.towers.items()}
        with self.fake:
            _without_memory(model)
            model.train()
            self.optimizer = config.optimizer.build(parameter_groups(model, config.optimizer, tunings))
            self._update_once()
        trained = _bytes(p for p in model.parameters() if p.requires_grad)
        self.resident = Resident(
            weights=_bytes(model.parameters()) + _bytes(model.buffers()),
            gradients=trained,
            optimizer=_bytes(self._optimizer_state()),
            mean=0 if config.ema.decay is None else trained,
            largest_block=max(_bytes(block) for tower in model.towers.values() for block in _blocks(tower)),
        )

    def step(self, rows: int, micro_batch_size: int | None, sharded: bool = False) -> tuple[Taken, int]:
        """A training step of this rank but for its loss, whose place something without cost takes.

        Also the bytes that were there when the loss was asked for. If `sharded`, no gradient stays where it was made.
        """
        stand_in = _StandIn(self.config.loss)
        with self._stage(1 if sharded else self.ranks), ExitStack() as until_end:
            batch = self.batch(rows)
            if sharded:
                for parameter in self.model.parameters():
                    if parameter.requires_grad:
                        hook = parameter.register_post_accumulate_grad_hook(_let_go)  # type: ignore[no-untyped-call]
                        until_end.callback(hook.remove)
            limit, seed = self.config.max_grad_norm, (0, 0)
            stand_in.peak = Peak([*self._held(), *_tensors(batch)])
            with _Products() as flops, stand_in.peak:
                training_step(
                    self.model, stand_in.losses, self.optimizer, batch, self.context, limit, micro_batch_size, seed
                )
            return Taken(stand_in.peak.bytes, flops.total), stand_in.alive

    def loss(self, rows: int) -> Taken:
        """The terms of the objective, forward and backward, for this rank's rows of the global batch."""
        model = self.model
        with self._stage(self.ranks):
            features = {
                tower: {f"{tower}_features": torch.empty(rows, model.embed_dim, requires_grad=True)}
                for tower in model.towers
            }
            batch = self.batch(rows)
            tensors = [x for named in features.values() for x in named.values()]
            with _Products() as flops, Peak([*self._held(), *tensors, *batch.ids.values()]) as peak:
                total, _ = objective(model, self.config.loss, batch, features)
                total.backward()  # type: ignore[no-untyped-call]
                model.zero_grad(set_to_none=True)
        return Taken(peak.bytes, flops.total)

    def forward(self, tower: str, full_form: bool = False) -> int:
        """FLOPs of one sample's features: what this tower computes for a caption that fills the context.

        In its `full_form` the network is run by open_clip's own forward, over every token in every block, padding
        included, whatever the tower would leave out. This is how open_clip's `docs/model_profile.csv` counts: 2 for a
        multiplication with its addition, products of attention among them and not halved where it is causal, norms,
        activations and softmax not counted.
        """
        with self._stage(1), torch.no_grad():
            inputs = torch.empty(1, *self.inputs[tower].shape, dtype=self.inputs[tower].dtype)
            module = self.model.towers[tower]
            assert isinstance(module, TowerModule)
            flops = _Products()
            with flops, self.context:
                module.projection(_whole_network(module)(inputs) if full_form else module(inputs))
        return flops.total

    def batch(self, rows: int) -> Batch:
        """So many rows of what the trainer is given."""
        kept = {name: tower.tuning.keep_features for name, tower in self.config.towers.items()}
        with self.fake:
            inputs = {k: torch.empty(rows, *x.shape, dtype=x.dtype) for k, x in self.inputs.items() if not kept[k]}
            pooled = {k: torch.empty(rows, int(self.model.towers[k].width)) for k in kept if kept[k]}  # type: ignore[arg-type]
            indices = torch.empty(rows, dtype=torch.int64)
        return Batch(inputs, indices, {"caption": indices, "label": indices}, pooled=pooled)

    def bytes_of(self, rows: int) -> int:
        """Of a batch."""
        return _bytes(_tensors(self.batch(rows)))

    def _held(self) -> Iterator[Tensor]:
        """What is there all the time."""
        yield from self.model.parameters()
        yield from self.model.buffers()
        yield from self._optimizer_state()

    def _optimizer_state(self) -> Iterator[Tensor]:
        for state in self.optimizer.state.values():
            yield from (x for x in state.values() if isinstance(x, Tensor))

    def _update_once(self) -> None:
        """After which the optimizer has its state."""
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def _stage(self, ranks: int) -> Iterator[None]:
        # In evaluation mode (frozen towers) attention has a fast path, in an operator that nobody counts.
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            kernels = kernels_of_a_gpu() if self.on_gpu else nullcontext()
            with distributed.pretended(ranks), self.fake, kernels:
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)


class _StandIn:
    """Takes the place of all terms: every feature that they need gets a gradient."""

    weight = 1.0

    def __init__(self, losses: Mapping[str, Loss]) -> None:
        self.needs = frozenset[str]().union(*(loss.needs() for loss in losses.values()))
        self.peak = Peak()
        self.alive = 0
        self.losses: Any = {"stand_in": self}

    def __call__(self, features: Features) -> Tensor:
        self.alive = self.peak.alive
        return torch.stack([x.sum() for name, x in features.tensors.items() if name in self.needs]).sum()


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts FLOPs by torch's own formulas.

    `FlopCounterMode` has them from the same place, but what it notes of modules keeps alive what checkpointed blocks
    compute a second time, so that they seem to take more memory and not less.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        count: Any = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += int(count(*args, **(kwargs or {}), out_val=output))
        return output


@contextmanager
def kernels_of_a_gpu() -> Iterator[None]:
    """Under autocast norms are in float32 there, and attention is fused, which training on a CPU has as products."""
    attention = F.scaled_dot_product_attention

    def fused(*args: Any, **named: Any) -> Tensor:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True):
            return attention(*args, **named)

    def in_float32(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, *args, **named: norm(x.float() if torch.is_autocast_enabled("cpu") else x, *args, **named)

    with (
        patch.object(F, "layer_norm", in_float32(F.layer_norm)),
        patch.object(F, "group_norm", in_float32(F.group_norm)),
        patch.object(F, "scaled_dot_product_attention", fused),
    ):
        yield


def _without_memory(model: nn.Module) -> None:
    """From the meta device to tensors that say where they are; what is shared stays shared."""
    made: dict[int, Any] = {}

    def empty(x: Tensor) -> Tensor:
        return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="cpu")

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                new = made.setdefault(id(parameter), nn.Parameter(empty(parameter), parameter.requires_grad))
                module._parameters[name] = new
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = made.setdefault(id(buffer), empty(buffer))


def _whole_network(module: TowerModule) -> Callable[[Tensor], Tensor]:
    """The tower's network by its own forward, which knows of nothing to leave out."""
    if isinstance(module, ImageEncoder):
        image: nn.Module = module.net
        return lambda inputs: image(inputs.float())
    if isinstance(module, TextTransformerEncoder):
        text: nn.Module = module.net
        return text
    return module


def _blocks(tower: nn.Module) -> Iterator[list[nn.Parameter]]:
    assert isinstance(tower, TowerModule)
    yield from tower.depths()
    yield list(tower.projection.parameters())


def _let_go(parameter: Tensor) -> None:
    parameter.grad = None


def _tensors(batch: Batch) -> list[Tensor]:
    ids = [x for x in batch.ids.values() if x is not batch.indices]
    return [*batch.inputs.values(), *batch.pooled.values(), batch.indices, *ids]


def _bytes(tensors: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)
