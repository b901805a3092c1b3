"""What an experiment will take on hardware that one may not have: size, FLOPs, memory, time and cost, from its config.

No data are opened and no weights are read. A training step is rehearsed (`rehearsal`), so that what is counted is what
would be computed; what is not rehearsed is said: how much of the hardware's peak a run reaches (`utilisation`) is a
knob, and what libraries keep for themselves (a context, workspaces, fragments) is what `memory_share` leaves over.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from string import ascii_lowercase
from typing import Any, Literal

from PIL import Image
from pydantic import Field
from torch import Tensor

from multimodal import distributed
from multimodal.assemble import Problems, assemble_outline
from multimodal.config import Findings, TrainConfig
from multimodal.data.loader import Reader
from multimodal.hardware import Hardware
from multimodal.memory import check_micro_batches, checkpoint_copy
from multimodal.rehearsal import Rehearsal
from multimodal.towers.batch_norm import trained_batch_norms

WORDS = 10_000
"""Enough pairs of letters for any vocabulary to be learnt in full."""
FLOAT = 4
"""Bytes of a feature, which is float32 in any precision."""


def _gpus_divide_the_batch(config: "PlanConfig") -> Findings:
    if config.global_batch_size % config.num_gpus:
        yield "global_batch_size", f"{config.global_batch_size} is not divisible by num_gpus={config.num_gpus}"


def _hardware_has_the_precision(config: "PlanConfig") -> Findings:
    try:
        config.hardware.precision(config.precision)
    except ValueError as error:
        yield "precision", str(error)


class PlanConfig(TrainConfig):
    """An experiment, and what it is to run on."""

    rules = (*TrainConfig.rules, _gpus_divide_the_batch, _hardware_has_the_precision)

    hardware: Hardware
    """One device of the machine."""
    num_gpus: int = Field(gt=0)
    """How many of them; each is a rank."""
    utilisation: float = Field(gt=0, le=1)
    """The share of the hardware's peak that a step reaches, with all FLOPs counted that it computes."""
    memory_share: float = Field(gt=0, le=1)
    """The share of a device's memory that tensors may fill."""
    samples_per_epoch: int | None = Field(gt=0)
    """Size of the data, where `duration` is in epochs."""
    out: str | None = Field(min_length=1)
    """A file for the plan as JSON."""


@dataclass(frozen=True)
class Size:
    """Of a tower, with its projection."""

    parameters: int
    trained: int
    forward_flops: int
    """Of a sample, all tokens in the context."""
    full_form_flops: int
    """The same, of what open_clip's own forward computes: the number to compare with published tables."""


@dataclass(frozen=True)
class Memory:
    """Bytes on each rank at the peak of a step."""

    weights: int
    optimizer: int
    mean: int
    """Of the weights, if one is kept (`ema.decay`)."""
    gradients: int
    batch: int
    """The input."""
    features: int
    """Of this rank's rows, and in micro-batches the gradients that are kept for them."""
    activations: int
    """And all else that is made on the way."""
    checkpoint: int
    """The copy that is written while steps go on, on a CPU; a GPU's is in other memory."""
    loss: int
    """While it is computed; not in the sum where the peak is at another time."""

    @property
    def peak(self) -> int:
        return (
            self.weights
            + self.optimizer
            + self.mean
            + self.gradients
            + self.batch
            + self.features
            + self.activations
            + self.checkpoint
        )


@dataclass(frozen=True)
class Time:
    """Of the whole run."""

    steps: int
    samples: int
    hours: float
    gpu_hours: float
    dollars: float


class Planner:
    """Answers questions about one configuration; each rehearsal is done once."""

    def __init__(
        self,
        config: PlanConfig,
        rehearsed: Callable[[], object] = lambda: None,  # called after each rehearsal of a step, which may take seconds
    ) -> None:
        self.config, self.ranks, self.rehearsed = config, config.num_gpus, rehearsed
        self.precision = config.hardware.precision(config.precision)
        self.rows = config.global_batch_size // config.num_gpus
        self.budget = int(config.memory_share * config.hardware.memory_gb * 1e9)
        self.rehearsal = self._rehearsal(config)
        problems = Problems()
        with problems.at("micro_batch_size"), distributed.pretended(self.ranks):
            check_micro_batches(self.rehearsal.model, config)
        problems.report()

    @cached_property
    def micro_batch_size(self) -> int | None:
        """As configured; what "auto" finds, or 1 if nothing fits."""
        wanted = self.config.micro_batch_size
        return (self.largest_micro_batch() or 1) if wanted == "auto" else wanted

    def towers(self) -> dict[str, Size]:
        """By name."""
        found = {}
        for name in self.rehearsal.model.towers:
            parameters = self.rehearsal.model.tower_parameters(name)
            found[name] = Size(
                parameters=sum(p.numel() for p in parameters),
                trained=sum(p.numel() for p in parameters if p.requires_grad),
                forward_flops=self.rehearsal.forward(name),
                full_form_flops=self.rehearsal.forward(name, full_form=True),
            )
        return found

    def training_flops(self) -> float:
        """Of a sample: every forward and backward pass that a step makes, and its share of the loss."""
        return self._flops(self.micro_batch_size)

    def whole_batch_flops(self) -> float:
        """The same without micro-batches and their second forward pass: what runs of several sizes are compared by."""
        return self._flops(None)

    def _flops(self, micro_batch_size: int | None) -> float:
        step, _ = self._step(micro_batch_size, self.config.sharding, None)
        return float(step.flops / self._rehearsed_rows(micro_batch_size) + self._loss.flops / self.rows)

    def samples_per_s(self) -> float:
        """Over all ranks."""
        reached = self.config.hardware.flops_per_s(self.precision) * self.config.utilisation
        return self.ranks * reached / self.training_flops()

    def time(self) -> Time | None:
        """None where nobody says how many samples an epoch has."""
        config = self.config
        if config.duration.unit == "epochs" and config.samples_per_epoch is None:
            return None
        per_epoch = max(1, (config.samples_per_epoch or 0) // config.global_batch_size)
        steps = config.duration.steps(config.global_batch_size, per_epoch)
        samples = steps * config.global_batch_size
        hours = samples / self.samples_per_s() / 3600
        gpu_hours = hours * self.ranks
        return Time(steps, samples, hours, gpu_hours, gpu_hours * config.hardware.price_per_hour)

    def memory(
        self,
        micro_batch_size: int | None,
        sharding: Literal["none", "full"] | None = None,  # None: as configured
        grad_checkpointing: bool | None = None,  # of all towers that can; None: as configured
    ) -> Memory:
        """Of a rank."""
        sharding = sharding or self.config.sharding
        if grad_checkpointing is not None and not self.can_checkpoint(grad_checkpointing):
            grad_checkpointing = None
        rehearsal, resident = self.rehearsal, self.rehearsal.resident
        whole, seen = self._is_whole(micro_batch_size), self._rehearsed_rows(micro_batch_size)
        step, alive = self._step(micro_batch_size, sharding, grad_checkpointing)
        per_row = rehearsal.model.embed_dim * FLOAT * len(rehearsal.model.towers)
        unseen = (self.rows - seen) * per_row
        on_the_way = max(step.peak + 2 * unseen, alive + unseen + self._loss.peak)
        held = resident.weights, resident.optimizer, resident.mean, resident.gradients
        weights, optimizer, mean, gradients = (-(-x // self.ranks) for x in held) if sharding == "full" else held
        if sharding == "full":
            weights += 2 * resident.largest_block
            on_the_way += gradients
        features = self.rows * per_row * (1 if whole else 2)
        on_a_cpu = self.config.hardware.device == "cpu"  # elsewhere the copy is in the memory of the host
        return Memory(
            weights=weights,
            optimizer=optimizer,
            mean=mean,
            gradients=gradients,
            batch=rehearsal.bytes_of(self.rows),
            features=features,
            activations=on_the_way - gradients - features,
            checkpoint=checkpoint_copy(self.config, rehearsal.model, resident.optimizer) if on_a_cpu else 0,
            loss=self._loss.peak,
        )

    def fits(self, memory: Memory) -> bool:
        """On this hardware."""
        return memory.peak <= self.budget

    def largest_micro_batch(self) -> int:
        """All rows of a rank, or the largest power of two of them that fits; 0 if not even one does."""
        memory = self.memory(None)
        if self.fits(memory) or trained_batch_norms(self.rehearsal.model):
            return self.rows if self.fits(memory) else 0
        size = self._power_of_two(memory)
        while size and not self.fits(self.memory(size)):
            size //= 2
        while size and 2 * size < self.rows and self.fits(self.memory(2 * size)):
            size *= 2
        return size

    def can_checkpoint(self, grad_checkpointing: bool) -> bool:
        """Whether a tower could have it on or off that has not."""
        return any(getattr(t, "grad_checkpointing", grad_checkpointing) != grad_checkpointing for t in self._towers())

    def helps(self) -> Iterator[str]:
        """Settings with which it fits, where it does not."""
        size = self.micro_batch_size
        if largest := self.largest_micro_batch():
            yield f"micro_batch_size={largest}"
        if self.can_checkpoint(True) and self.fits(self.memory(size, grad_checkpointing=True)):
            yield " ".join(f"towers.{name}.grad_checkpointing=true" for name in self._checkpointing())
        memory = self.memory(size)
        if memory.checkpoint and memory.peak - memory.checkpoint <= self.budget:
            yield "checkpoint.background=false"
        whole = self._power_of_two(self.memory(None))
        if whole and self.config.global_batch_size % whole == 0 and self.config.global_batch_size // whole > self.ranks:
            yield f"num_gpus={self.config.global_batch_size // whole}"
        if self.config.sharding == "none" and self.ranks > 1 and self.fits(self.memory(size, "full")):
            yield "sharding=full"

    def _towers(self) -> list[Any]:
        return list(self.config.towers.values())

    def _checkpointing(self) -> list[str]:
        return [name for name, tower in self.config.towers.items() if not getattr(tower, "grad_checkpointing", True)]

    def _power_of_two(self, whole: Memory) -> int:
        """Rows whose activations would find room, if what all of them take is in proportion."""
        rest = whole.peak - whole.activations - whole.features
        rows = self.rows * (self.budget - rest) // max(1, whole.activations + whole.features)
        return 1 << (min(rows, self.rows).bit_length() - 1) if rows > 0 else 0

    def _is_whole(self, micro_batch_size: int | None) -> bool:
        return micro_batch_size is None or micro_batch_size >= self.rows

    def _rehearsed_rows(self, micro_batch_size: int | None) -> int:
        """All, or two chunks: a third one takes what the second takes."""
        return self.rows if self._is_whole(micro_batch_size) else min(self.rows, 2 * (micro_batch_size or 0))

    @cached_property
    def _loss(self) -> Any:
        loss = self.rehearsal.loss(self.rows)
        self.rehearsed()
        return loss

    @cache  # noqa: B019  # lives as long as its answers
    def _step(
        self, micro_batch_size: int | None, sharding: Literal["none", "full"], grad_checkpointing: bool | None
    ) -> Any:
        rehearsal = self.rehearsal
        if grad_checkpointing is not None:
            rehearsal = self._with_checkpointing(grad_checkpointing)
        step = rehearsal.step(self._rehearsed_rows(micro_batch_size), micro_batch_size, sharding == "full")
        self.rehearsed()
        return step

    @cache  # noqa: B019
    def _with_checkpointing(self, on: bool) -> Rehearsal:
        towers = {
            name: tower.model_copy(update={"grad_checkpointing": on}) if hasattr(tower, "grad_checkpointing") else tower
            for name, tower in self.config.towers.items()
        }
        return self._rehearsal(self.config.model_copy(update={"towers": towers}))

    def _rehearsal(self, config: PlanConfig) -> Rehearsal:
        readers, model = assemble_outline(config, _captions)
        problems, inputs = Problems(), {}
        for name, reader in readers.items():
            with problems.at(f"towers.{name}"):
                inputs[name] = _example(reader)
        problems.report()
        return Rehearsal(model, config, inputs, self.precision, config.hardware.device, self.ranks)


def _captions() -> list[str]:
    """Such that a vocabulary that is learnt from them has as many tokens as it may."""
    rng = random.Random(0)
    return [" ".join("".join(rng.choices(ascii_lowercase, k=8)) for _ in range(WORDS))]


def _example(reader: Reader) -> Tensor:
    """One sample's input as preprocessed; its shape is what counts."""
    samples: dict[str, Any] = {"image": Image.new("RGB", (8, 8)), "text": "a caption"}
    if reader.reads not in samples:
        raise ValueError(f"reads '{reader.reads}', of which a plan does not know how large it is")
    example: Tensor = reader.preprocessor(samples[reader.reads], None)
    return example
