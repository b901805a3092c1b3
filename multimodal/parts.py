"""The contracts on one page: what a part of an experiment is, and how one is described and found.

A part is a frozen pydantic model whose fields are its knobs. Its YAML names the class in `_target_`; `resolve` turns
such a mapping into the part, from allowed packages only: this one, and installed packages with the entry point group
`multimodal.parts`. A field annotated with a contract (`loss: dict[str, Loss]`) resolves by itself.
"""

import difflib
import importlib
import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    Strict,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema
from torch import Tensor, nn
from torch.optim import Optimizer as TorchOptimizer

from multimodal.batch import Features, Sample
from multimodal.units import Cadence

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

ENTRY_POINT_GROUP = "multimodal.parts"


# --- describing -----------------------------------------------------------------------------------------------------


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The hint "Did you mean 'x'?" for the nearest known word, or nothing."""
    near = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""


def problem(message: str, *path: str | int, value: object = None) -> InitErrorDetails:
    """One line of a ValidationError, at `path` below the value under validation."""
    return InitErrorDetails(
        type=PydanticCustomError("problem", "{message}", {"message": message}), loc=path, input=value
    )


T = TypeVar("T")
Operational = Annotated[T, "operational"]
"""Marks a field that changes where, how fast or how often watched, and not what is computed."""


class Section(BaseModel):
    """Typed fields and nothing beside them: unknown keys are refused, with the nearest known name; strict scalars."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="wrap")
    @classmethod
    def _suggest_names(cls, value: Any, handler: Callable[[Any], Self]) -> Self:
        try:
            return handler(value)
        except ValidationError as error:
            lines = []
            for line in error.errors(include_url=False):
                message = line["msg"]
                if line["type"] == "extra_forbidden" and len(line["loc"]) == 1:
                    message = "unknown key." + did_you_mean(str(line["loc"][0]), cls.model_fields)
                elif line["type"] == "missing":
                    message = "no value given"
                elif line["type"] not in ("problem", "value_error", "extra_forbidden"):
                    message = f"{message[:1].lower()}{message[1:]}, got {line['input']!r}"
                lines.append(problem(message.removeprefix("Value error, "), *line["loc"], value=line["input"]))
            raise ValidationError.from_exception_data(cls.__name__, lines) from None


class Part(Section, ABC):
    """Base of every contract: a part is its knobs; the subclass says what it does with them."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        if inspect.isabstract(cls):  # a contract: the value says by `_target_` which of its parts it is
            return core_schema.no_info_plain_validator_function(lambda value: resolve(value, cls))
        return handler(source)

    @classmethod
    def contract(cls) -> "type[Part]":
        """Which of the contracts on this page the part fills."""
        return next(base for base in cls.__mro__ if base.__module__ == __name__)

    @classmethod
    def target(cls) -> str:
        """What `_target_` says of this part."""
        return f"{cls.__module__}.{cls.__qualname__}"

    @model_serializer(mode="wrap")
    def _name_target(self, handler: Callable[[Self], dict[str, Any]]) -> dict[str, Any]:
        return {"_target_": self.target(), **handler(self)}


P = TypeVar("P", bound=Part)


# --- finding --------------------------------------------------------------------------------------------------------


@cache
def allowed_packages() -> frozenset[str]:
    """Top-level packages that parts may come from: ours, and those installed ones that announce themselves."""
    announced = (point.value.split(":")[0].split(".")[0] for point in entry_points(group=ENTRY_POINT_GROUP))
    return frozenset({"multimodal", *announced})


def find_part(target: str, contract: type[Part]) -> type[Part]:
    """The class that `target` names; ValueError if it is not an allowed `contract`, before anything is imported."""
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", target):
        raise ValueError(f"'{target}' is not a dotted path to a class")
    package, (module_name, _, name) = target.split(".")[0], target.rpartition(".")
    if package not in allowed_packages():
        allowed = ", ".join(sorted(allowed_packages()))
        raise ValueError(f"'{target}' is outside the packages that parts may come from ({allowed})")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(f"'{module_name}' needs the package '{error.name}', which is not installed") from None
        raise ValueError(f"there is no module '{error.name}'") from None
    except (ImportError, SyntaxError) as error:
        raise ValueError(f"'{module_name}' cannot be imported: {error}") from None
    parts = {k: v for k, v in vars(module).items() if inspect.isclass(v) and issubclass(v, Part)}
    found = parts.get(name)
    if found is None:
        raise ValueError(f"'{module_name}' has no part '{name}'.{did_you_mean(name, parts)}")
    if inspect.isabstract(found):
        raise ValueError(f"'{name}' is what parts derive from, not a part itself")
    if not issubclass(found, contract):
        kinds = f"wanted is one of kind {contract.__name__}, this is of kind {found.contract().__name__}"
        raise ValueError(f"'{name}' is the wrong kind of part: {kinds}")
    return found


def resolve(value: Any, contract: type[P]) -> P:
    """The part that a mapping with `_target_` describes; every problem in it is reported at its own path."""
    if isinstance(value, contract):
        return value
    if not isinstance(value, Mapping) or not isinstance(value.get("_target_"), str):
        message = f"should be a {contract.__name__}: a mapping whose `_target_` names one"
        raise ValidationError.from_exception_data(contract.__name__, [problem(message, value=value)])
    try:
        found = find_part(value["_target_"], contract)
    except ValueError as error:
        line = problem(str(error), "_target_", value=value["_target_"])
        raise ValidationError.from_exception_data(contract.__name__, [line]) from None
    return found.model_validate({key: item for key, item in value.items() if key != "_target_"})  # type: ignore[return-value]


# --- data -----------------------------------------------------------------------------------------------------------


class BadSample(ValueError):
    """A sample that cannot be used; says which one and why. In training another one stands in for it."""


class Source(ABC):
    """Samples at random access; the same index gives the same sample in every process."""

    class_names: tuple[str, ...] = ()
    """Names by label, where samples have labels."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """The sample; BadSample, naming the file and key, if it is broken."""

    @abstractmethod
    def captions(self, index: int) -> tuple[str, ...]:
        """Only the captions of a sample, without decoding anything else."""

    def label(self, index: int) -> int | None:
        """Only the class index of a sample, likewise; None where samples have none."""
        return None


class Dataset(Part):
    """Where samples come from. Files are relative to `root`; `build` refuses what is missing, not the first epoch."""

    @abstractmethod
    def build(self, root: Path) -> Source: ...


class Augment(Part):
    """A random change to a training image; `rng` is a function of (seed, epoch, index), so that it can be repeated."""

    random: ClassVar[bool] = True
    """Whether an image may become another one each time."""

    @abstractmethod
    def __call__(self, image: "Image", size: int, rng: Random) -> "Image":
        """The image, `size` pixels square, or any other size to be resized and cropped as in evaluation."""


# --- towers ---------------------------------------------------------------------------------------------------------


class Preprocessor(Protocol):
    """From a sample's input to the tensor that a tower reads; runs in the data workers."""

    @property
    def num_truncated(self) -> int:
        """Inputs that were cut to fit, by this copy, so far."""

    def __call__(self, value: Any, rng: Random | None) -> Tensor:
        """`rng` is None in evaluation, where nothing is random."""

    def save(self, folder: Path) -> None:
        """Write what a checkpoint needs to make this preprocessor again (a trained vocabulary)."""


class TowerModule(nn.Module, ABC):
    """What a tower builds: from preprocessed inputs to one vector a sample, and from there into the shared space."""

    width: int
    """W, of the output."""
    projection: nn.Module
    """From [n, W] to [n, D]; the model calls it behind the tower."""

    @abstractmethod
    def forward(self, inputs: Tensor) -> Tensor:
        """From [n, ...] as preprocessed, on the device, to pooled features [n, W]."""

    @abstractmethod
    def depths(self) -> list[list[nn.Parameter]]:
        """All parameters but the projection's, once each, by depth: what precedes the blocks, then block by block.

        What follows the last block (a norm) is with the last block.
        """


class Tuning(Section):
    """How a tower's weights are trained, or that they are not."""

    frozen: Literal["none", "tower", "all"] = "none"
    """Whether the tower stays as it is: "tower" leaves its projection to be trained, "all" does not (LiT)."""
    unfrozen_blocks: int = Field(default=0, ge=0)
    """So many of the last blocks of a frozen tower are trained all the same."""
    frozen_names: Annotated[tuple[str, ...], Strict(False)] = ()
    """Parameters that stay as they are, by name within the tower, with wildcards: "net.*embedding*"."""
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of this tower, instead of the optimizer's."""
    weight_decay: float | None = Field(default=None, ge=0)
    """Weight decay of this tower's matrices, instead of the optimizer's."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """The learning rate of a block is that of the next one times this; the projection has the tower's own."""
    keep_features: bool = False
    """Compute the features of a wholly frozen tower once, before training, and read them instead of its inputs."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.unfrozen_blocks and self.frozen == "none":
            raise ValueError("unfrozen_blocks is about a frozen tower: frozen is none")
        if self.keep_features and (self.frozen == "none" or self.unfrozen_blocks):
            raise ValueError("keep_features needs a wholly frozen tower: frozen=tower or all, unfrozen_blocks=0")
        return self


class Tower(Part):
    """One modality's encoder."""

    reads: ClassVar[str]
    """The sample's input that this tower takes: "image", "text"."""

    tuning: Tuning = Tuning()
    """What of it is trained, and at which rate."""

    @abstractmethod
    def preprocessor(self, captions: Callable[[], Iterable[str]], augment: Augment, saved: Path | None) -> Preprocessor:
        """Made for a new run from the training `captions`, or as it was `saved` in a checkpoint's folder."""

    @abstractmethod
    def build(self, preprocessor: Any, embed_dim: int) -> TowerModule:
        """The module, randomly initialised unless it says otherwise, for what its own `preprocessor` makes.

        ValueError where the settings do not fit each other, or what the preprocessor makes.
        """


class Encoding(Protocol):
    """Text to token ids."""

    vocab_size: int
    """Ids are below it."""
    pad: int
    """The id that fills up the context."""

    @property
    def end(self) -> int | None:
        """The id of the last token of every text; None if texts do not end in a token of their own."""

    def __call__(self, text: str) -> list[int]:
        """All ids of a text, however long, with its marks of start and end."""

    def decode(self, ids: Tensor) -> str:
        """The text that the ids [L] stand for, without padding and marks of start and end."""

    def save(self, folder: Path) -> None:
        """Write what `Tokenizer.build` needs to make this again."""


class Tokenizer(Part):
    """How a text tower cuts captions into tokens."""

    @abstractmethod
    def build(self, captions: Callable[[], Iterable[str]], saved: Path | None) -> Encoding:
        """Trained on `captions`, if it learns its vocabulary, or read from `saved`, a checkpoint's folder."""


# --- objective ------------------------------------------------------------------------------------------------------


class Loss(Part):
    """A term of the objective: callable on features, a scalar whose mean over ranks is the term of the global batch."""

    weight: float = Field(default=1.0, gt=0)
    """Multiplies the term in the sum of all terms."""

    @abstractmethod
    def needs(self) -> frozenset[str]:
        """What it reads of `Features`: names of tensors, "logit_bias"; checked against the model before the start."""

    @abstractmethod
    def __call__(self, features: Features) -> Tensor: ...


class Optimizer(Part):
    """`groups` are torch's parameter groups, decay already split off for gains, biases and scales.

    What is built heeds torch's `found_inf` (the fused optimizers do), so that a step that is not finite is left out.
    """

    lr: float = Field(gt=0)
    """Peak learning rate."""

    weight_decay: float = Field(ge=0)
    """For matrices; gains, biases and scales have none."""

    @abstractmethod
    def build(self, groups: list[dict[str, Any]]) -> TorchOptimizer: ...


class Schedule(Part):
    """The learning rate as a pure function of the step."""

    @abstractmethod
    def __call__(self, step: int, warmup_steps: int, total_steps: int) -> float:
        """The factor on the peak learning rate for the update numbered `step`, from 0."""


# --- watching -------------------------------------------------------------------------------------------------------


class Encoder(Protocol):
    """The model as evaluations see it."""

    def encode(self, tower: str, inputs: Sequence[Any]) -> Tensor:
        """Raw inputs (PIL images, strings), indexed lazily, to unit-norm float32 [n, D] on the CPU of every rank."""


@dataclass(frozen=True)
class Report:
    """What an evaluation found."""

    metrics: dict[str, float]
    """By short name ("top1", "i2t_r1"); logged as `eval/<name>/<metric>`."""
    figures: dict[str, "Callable[[], Figure]"] = field(default_factory=dict)
    """By file name without ending; drawn on one rank only."""


class Eval(Part):
    """An evaluation with its own cadence and data."""

    metrics: ClassVar[tuple[str, ...]]
    """Short names of what it reports."""
    towers: ClassVar[tuple[str, ...]] = ("image", "text")
    """Names of the towers that it encodes with."""

    every: Cadence
    """How often during training; it always runs at the end."""

    @abstractmethod
    def build(self, root: Path) -> Callable[[Encoder], Report]:
        """Open the data (below `root`), so that what is missing is an error before the start; run when called."""


class Mirror(Protocol):
    """Where a run's log is shown a second time, beside its own files."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def figure(self, step: int, name: str, path: Path) -> None: ...

    def finish(self, exit_code: int) -> None: ...


@dataclass(frozen=True)
class RunInfo:
    """What a tracker is told of the run."""

    name: str
    id: str
    """Stays the same when the run is resumed."""
    folder: Path
    config: dict[str, Any]
    history: list[dict[str, float]]
    """Rows logged before this start, when resuming."""


class Tracker(Part):
    """Mirrors the log elsewhere; never the source of truth."""

    @abstractmethod
    def start(self, run: RunInfo) -> Mirror: ...


# --- taking away ----------------------------------------------------------------------------------------------------


class Format(Part):
    """Another library's form of a trained model."""

    library: ClassVar[str]
    """Its name, as hubs know it."""

    @abstractmethod
    def write(self, exported: Any, folder: Path) -> str:
        """Write an `export.exported.Exported` into a folder; ValueError if it cannot be expressed.

        What is returned is Python that loads "FOLDER" with the other library, for the model card.
        """

    @abstractmethod
    def differences(self, exported: Any, folder: Path) -> dict[str, float]:
        """Load what was written with the other library, and compare: the largest difference by what is compared."""
