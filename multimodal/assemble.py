"""From a configuration to what it describes: source, readers, model, evaluations; all that is wrong is said at once."""

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from multimodal import checkpoint, distributed
from multimodal.config import EVAL, ConfigError, ModelSection, TrainConfig, TrainedConfig, Weights, check
from multimodal.data.first import First
from multimodal.data.loader import Reader
from multimodal.encoder import Encoder
from multimodal.model import Model
from multimodal.offline import offline
from multimodal.outline import outlined
from multimodal.parts import Augment, BadSample, Eval, Report, Source, Sources, Tower
from multimodal.parts import Encoder as EncoderContract
from multimodal.remembering import Remembering
from multimodal.sharding import check_blocks_are_called, is_sharded, shard

logger = logging.getLogger(__name__)

Evaluation = Callable[[EncoderContract], Report]
LONG = 10
"""Seconds from which on an evaluation says that it is done."""


@dataclass(frozen=True)
class Assembled:
    """What a configuration describes, ready to be trained or evaluated."""

    readers: dict[str, Reader]
    model: Model
    precision: str
    """Of the towers: "bf16", "fp16" or "fp32"."""

    @property
    def context(self) -> torch.autocast:
        """In which the towers run."""
        device = self.model.logit_scale.device
        cached = not is_sharded(self.model)  # the cache would keep whole weights in bf16
        half = torch.float16 if self.precision == "fp16" else torch.bfloat16
        return torch.autocast(device.type, half, enabled=self.precision != "fp32", cache_enabled=cached)

    def encoder(self, workers: int) -> Remembering:
        """The model as evaluations see it; `workers` processes read images."""
        return Remembering(Encoder(self.model, self.readers, self.context, workers=workers))


def device_of(wanted: str) -> torch.device:
    """The device that "auto", "cpu" or "cuda" means here; ConfigError where there is none."""
    if wanted not in ("auto", "cpu", "cuda"):
        raise ConfigError([("device", f"should be auto, cpu or cuda, got {wanted!r}")])
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise ConfigError([("device", "torch sees no GPU here; device=auto takes what there is")])
    if wanted == "cpu" or not available:
        return torch.device("cpu")
    index, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if index >= count:
        raise ConfigError([("device", f"there are {count} GPUs for at least {index + 1} processes on this machine")])
    return torch.device("cuda", index)


def be_deterministic(wanted: bool) -> None:
    """Whether torch takes only what gives the same bits every time, for all that follows in this process."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when a GPU is first used
    torch.use_deterministic_algorithms(wanted)


def native_precision(device: torch.device) -> str:
    """ "bf16" where the hardware multiplies it, else "fp32"."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    flags: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if flags.get("avx512_bf16") or flags.get("amx_bf16") else "fp32"


def check_precision(wanted: str, device: torch.device) -> None:
    """ValueError for training in fp16 on a CPU."""
    if wanted == "fp16" and device.type == "cpu":
        raise ValueError("fp16 is for training on a GPU; on a CPU it is slower than fp32: auto, fp32 or bf16")


class Problems(list[tuple[str, str]]):
    """Collects errors of users' making by the dotted path of the part that raised them."""

    @contextmanager
    def at(self, path: str) -> Iterator[None]:
        """Note a ValueError or OSError (a missing file), and go on."""
        try:
            yield
        except (ValueError, OSError) as error:
            self.append((path, str(error)))

    def report(self) -> None:
        """Raise what was collected."""
        if self:
            raise ConfigError(list(self))


def open_source(config: TrainConfig, problems: Problems) -> Source | None:
    """The training data."""
    source = None
    with problems.at("dataset"):
        source = config.dataset.build(Path(config.paths.datasets))
        if config.max_samples is not None:
            source = First(source, config.max_samples)
        if len(source) < config.global_batch_size:
            have, batch = f"{len(source):,} samples", config.global_batch_size
            raise ValueError(f"has {have}, fewer than one batch of global_batch_size={batch}")
    for name, loss in config.loss.items():
        with problems.at(f"loss.{name}"):
            if source is not None and "label_ids" in loss.needs() and source.label(0) is None:
                raise ValueError("needs classes, and the samples of this dataset have none: same_by=caption")
    return source


def count_steps(config: TrainConfig, source: Source | None, problems: Problems) -> tuple[int, int, int]:
    """Optimisation steps in an epoch, in the run, and of its warm-up; zeros where there is no source."""
    if source is None:
        return 0, 0, 0
    per_epoch = max(1, len(source) // config.global_batch_size)
    total = config.duration.steps(config.global_batch_size, per_epoch)
    warmup = config.warmup.steps_of(total, config.global_batch_size, per_epoch)
    with problems.at("warmup"):
        if warmup > total:
            raise ValueError(f"{config.warmup} is longer than duration={config.duration}")
    return per_epoch, total, warmup


def open_evaluations(evals: Mapping[str, Eval], data: Sources, problems: Problems) -> dict[str, Evaluation]:
    """The evaluations by name, their data opened; their reports say what they were measured with."""
    evaluations: dict[str, Evaluation] = {}
    for name, evaluation in evals.items():
        with problems.at(f"evals.{name}"):
            settings = evaluation.model_dump(mode="json", exclude={"every"})
            evaluations[name] = partial(_with_settings, evaluation.build(data), settings)
    return evaluations


def _with_settings(run: Evaluation, settings: Mapping[str, Any], encoder: EncoderContract) -> Report:
    return replace(run(encoder), settings=settings)


def assemble(
    config: TrainConfig, source: Source | None, saved: Path | None, started_from: Path | None = None
) -> Assembled:
    """Readers and model: new ones, or as in the `saved` checkpoint.

    New ones learn their vocabulary from `source`, or have that of the checkpoint that they are `started_from`, whose
    weights know no other. Weights are initialised from the seed; loading them is the caller's. They are sharded if
    that is asked for and there are several ranks.
    """
    device = device_of(config.device)

    def captions() -> Iterator[str]:
        if source is None:
            raise ValueError("a vocabulary can only be learnt where the training data is")
        return chain.from_iterable(source.captions(index) for index in range(len(source)))

    torch.manual_seed(config.seed)
    readers, model = build(config.towers, config.model, config.augment, captions, saved, started_from)
    _prepare(model, config)
    precision = native_precision(device) if config.precision == "auto" else config.precision
    if config.sharding == "full" and distributed.started():
        shard(model, device)
    return Assembled(readers, model.to(device), precision)


def assemble_outline(config: TrainConfig, captions: Callable[[], Iterable[str]]) -> tuple[dict[str, Reader], Model]:
    """Readers and model on torch's meta device: shapes without memory, for which no weights are read.

    A vocabulary is learnt from `captions`, which stand for those of the data.
    """
    readers, model = build(config.towers, config.model, config.augment, captions, None, outline=True)
    _prepare(model, config)
    return readers, model


def _prepare(model: Model, config: TrainConfig) -> None:
    """Freeze what is not trained; ConfigError where that, or sharding, is not possible."""
    problems = Problems()
    for name, tower in config.towers.items():
        with problems.at(f"towers.{name}.tuning"):
            model.freeze({name: tower.tuning})
        if config.sharding == "full":
            with problems.at(f"towers.{name}"):
                check_blocks_are_called(model.towers[name])
    problems.report()


def build(
    towers: Mapping[str, Tower],
    section: ModelSection,
    augment: Augment,
    captions: Callable[[], Iterable[str]],
    saved: Path | None,
    started_from: Path | None = None,
    outline: bool = False,
) -> tuple[dict[str, Reader], Model]:
    """The readers and the model of some towers, without memory if it is an `outline`; ConfigError with all that does
    not fit."""
    problems, readers, preprocessors = Problems(), {}, {}
    for name, tower in towers.items():
        with problems.at(f"towers.{name}"):
            known = saved or (started_from if tower.learns and _has_learnt(started_from, name) else None)
            preprocessors[name] = tower.preprocessor(captions, augment, known / name if known else None)
            readers[name] = Reader(tower.reads, preprocessors[name])

    def model() -> Model:
        modules = {}
        for name, preprocessor in preprocessors.items():
            with problems.at(f"towers.{name}"):
                modules[name] = towers[name].build(preprocessor, section.embed_dim, saved is not None or outline)
        problems.report()
        return Model(modules, section)

    if outline:
        with torch.device("meta"):
            return readers, model()
    if saved is None:
        return readers, model()
    with offline():
        with outlined(saved) as check_weights:
            check_weights(model())
        return readers, model()


def _has_learnt(checkpoint_folder: Path | None, tower: str) -> bool:
    folder = None if checkpoint_folder is None else checkpoint_folder / tower
    return folder is not None and folder.is_dir() and any(folder.iterdir())


def load(folder: Path, weights: Weights = "raw", **changes: Any) -> tuple[TrainConfig, Assembled]:
    """The configuration and the model, whole, of a checkpoint's folder; `changes` replace operational settings."""
    raw = checkpoint.load_config(folder)
    checkpoint.verify(folder, unread={checkpoint.OPTIMIZER})
    config = check({**raw, "sharding": "none", **changes}, TrainedConfig)
    assembled = assemble(config, None, folder)
    checkpoint.load_model(folder, assembled.model, weights)
    return config, assembled


def evaluate(
    evaluations: Mapping[str, Evaluation], encoder: Remembering, weights: Weights = "raw"
) -> dict[str, Report]:
    """Run evaluations of a model as its weights are now: reports by `eval/<name>`.

    What was found with the running mean of the `weights` is in `eval_ema/<name>`.
    """
    reports = {}
    try:
        for name, run in evaluations.items():
            before, began = encoder.num_truncated, time.monotonic()
            try:
                reports[f"{EVAL[weights]}/{name}"] = run(encoder)
            except BadSample as error:
                raise BadSample(f"evals.{name}: {error}") from error
            seconds, (cut,) = time.monotonic() - began, distributed.total(encoder.num_truncated - before)
            if cut:
                logger.warning("%s: %d texts are longer than the context of their tower and were cut", name, cut)
            if seconds > LONG:
                logger.info("%s: evaluated in %.0f s", name, seconds)
    finally:
        encoder.forget()  # features take memory, and will be others
    return reports
