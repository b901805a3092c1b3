"""The contracts on one page: what a part of an experiment is.

A part is a frozen pydantic model: its fields are its knobs, each with a unit or bounds and a line of text, and its YAML
sets them and names the class in `_target_`. How that becomes the part is in `resolve`; what the file of a part needs of
it can be imported from here.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol

from pydantic import Field, Strict
from torch import Tensor, nn
from torch.optim import Optimizer as TorchOptimizer

from multimodal.batch import Features, Sample
from multimodal.resolve import Operational as Operational
from multimodal.resolve import Part as Part
from multimodal.resolve import Section as Section
from multimodal.resolve import did_you_mean as did_you_mean
from multimodal.units import Cadence

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image


# --- data -----------------------------------------------------------------------------------------------------------


class BadSample(ValueError):
    """A sample that cannot be used; says which one and why. In training another one stands in for it."""


class Source(ABC):
    """Samples at random access; the same index gives the same sample in every process.

    To be pickled: where there are several ranks, processes that read data get a copy. Contiguous arrays of numpy are
    shared; a file that is open or mapped is to be opened again where it arrives (`__getstate__`, `__reduce__`).
    """

    class_names: tuple[str, ...] = ()
    """Names by label, where samples have labels."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """The sample; BadSample, naming the file and key, if it is broken."""

    templates: tuple[str, ...] = ()
    """Prompts with one {} for the class name, where the data set brings its own."""

    @abstractmethod
    def captions(self, index: int) -> tuple[str, ...]:
        """Only the captions of a sample, without decoding anything else."""

    def key(self, index: int) -> str:
        """Only the key of a sample, likewise, broken or not; its number unless a source says better."""
        return str(index)

    def label(self, index: int) -> int | None:
        """Only the class index of a sample, likewise; None where samples have none, or any number of them."""
        return None

    def labels_of(self, index: int) -> tuple[int, ...] | None:
        """Only the class indices of a sample, likewise, where it may have any number; None where samples have none."""
        label = self.label(index)
        return None if label is None else (label,)


class Dataset(Part):
    """Where samples come from. Files are relative to `root`; `build` refuses what is missing, not the first epoch."""

    @abstractmethod
    def build(self, root: Path) -> Source: ...


class Sources:
    """Opens data sets, each once however many ask for it."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        """The folder that their files, and those of evaluations, are relative to."""
        self._opened: dict[tuple[type[Dataset], str], Source] = {}

    def open(self, dataset: Dataset) -> Source:
        """Its samples; the same object for the same settings."""
        key = type(dataset), dataset.model_dump_json()
        if key not in self._opened:
            self._opened[key] = dataset.build(self.root)
        return self._opened[key]


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

    @property
    def embedding(self) -> nn.Module | None:
        """The table that token ids are looked up in, if `forward` also takes what it makes of its inputs."""
        return None

    def lengths(
        self,
        inputs: Tensor,  # [n, L, ...] as preprocessed
    ) -> Tensor | None:  # int64 [n], at least 1
        """How much of each input features depend on: what is beyond is padding, which `forward` may get less of.

        None, as here, where they depend on all of it.
        """
        return None

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

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.unfrozen_blocks and self.frozen == "none":
            yield "unfrozen_blocks", "is about a frozen tower: frozen is none"
        if self.keep_features and (self.frozen == "none" or self.unfrozen_blocks):
            yield "keep_features", "needs a wholly frozen tower: frozen=tower or all, unfrozen_blocks=0"


class Tower(Part):
    """One modality's encoder."""

    reads: ClassVar[str]
    """The sample's input that this tower takes: "image", "text"."""

    tuning: Tuning = Tuning()
    """What of it is trained, and at which rate."""

    @property
    def learns(self) -> bool:
        """Whether its preprocessor learns something from the captions, without which its weights mean nothing."""
        return False

    @abstractmethod
    def preprocessor(self, captions: Callable[[], Iterable[str]], augment: Augment, saved: Path | None) -> Preprocessor:
        """Made for a new run from the training `captions`, or as it was `saved` in a checkpoint's folder."""

    @abstractmethod
    def build(self, preprocessor: Any, embed_dim: int, saved: bool = False) -> TowerModule:
        """The module, randomly initialised unless it says otherwise, for what its own `preprocessor` makes.

        `saved` says that a checkpoint's weights will follow: no others are read or downloaded then, whatever the
        settings say, and it is first built on torch's meta device, to be held against their shapes.
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

    learns: ClassVar[bool] = False
    """Whether its vocabulary is learnt from the captions."""

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
        """What it reads of `Features`: names of tensors, "logit_bias", "caption_ids", "label_ids"; checked before."""

    @abstractmethod
    def __call__(self, features: Features) -> Tensor: ...


class Optimizer(Part):
    """`groups` are torch's parameter groups, with their own `lr` and `weight_decay`; `hidden` are matrices of blocks.

    What is built heeds torch's `found_inf`: where it is 1, weights and state stay as they were. The fused optimizers
    do, others do as `optim.heeding_found_inf` returns them.
    """

    elementwise: ClassVar[bool] = True
    """Whether the update of a number follows from its own gradients alone, so that ranks can share the work."""

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

    @property
    def logit_scale(self) -> float:
        """The multiplier of cosines."""

    def encode(self, tower: str, inputs: Sequence[Any]) -> Tensor:
        """Raw inputs (PIL images, strings), indexed lazily, to unit-norm float32 [n, D] on the CPU of every rank.

        What was asked for before may be the same tensor: it is not to be changed.
        """


@dataclass(frozen=True)
class Estimate:
    """A number with what it has to be held against."""

    value: float
    low: float | None = None
    """Lower end of its 95% interval."""
    high: float | None = None
    """Upper end."""
    chance: float | None = None
    """What guessing gives on average."""
    count: int | None = None
    """Samples that it was measured on."""

    def __float__(self) -> float:
        return self.value


@dataclass(frozen=True)
class Report:
    """What an evaluation found."""

    metrics: Mapping[str, float | Estimate]
    """By short name ("top1", "i2t_r1"); logged as `eval/<name>/<metric>`."""
    figures: dict[str, "Callable[[], Figure]"] = field(default_factory=dict)
    """By file name without ending; drawn on one rank only."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What it was measured with, the knobs of the evaluation and of its data; added where evaluations are opened."""


class Eval(Part):
    """An evaluation with its own cadence and data."""

    towers: ClassVar[tuple[str, ...]] = ("image", "text")
    """Names of the towers that it encodes with."""

    every: Cadence
    """How often during training; it always runs at the end."""

    @property
    @abstractmethod
    def metrics(self) -> tuple[str, ...]:
        """Short names of what it reports."""

    @abstractmethod
    def build(self, data: Sources) -> Callable[[Encoder], Report]:
        """Open the data, so that what is missing is an error before the start; run when called.

        It is called on all ranks and has to give the same on all of them.
        """


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
