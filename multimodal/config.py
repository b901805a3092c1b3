"""The whole configuration, typed, and every problem in it reported at once.

A field is identity (it changes what is computed: a run can only be resumed with the same value) unless it is marked
`Operational` (where, how fast and how often watched).
"""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from multimodal.data.augment import Keep
from multimodal.parts import (
    Augment,
    Dataset,
    Eval,
    Loss,
    Operational,
    Optimizer,
    Part,
    Schedule,
    Section,
    Tower,
    Tracker,
    did_you_mean,
)
from multimodal.units import Cadence, Duration, Timeout, Warmup

MISSING = "???"

Weights = Literal["raw", "ema"]
"""Those of the last step, or their running mean."""
Precision = Literal["auto", "fp32", "bf16", "fp16"]
"""Of the towers, as it is asked for."""
EVAL: dict[Weights, str] = {"raw": "eval", "ema": "eval_ema"}
"""What the names of metrics begin with that an evaluation found with these weights."""


class RunError(RuntimeError):
    """A run cannot go on, for a reason that its user can mend."""


class DamagedCheckpoint(ValueError):
    """A checkpoint's files are not those that were written."""


class ConfigError(ValueError):
    """The configuration has problems, one line each, by dotted path."""

    def __init__(self, problems: list[tuple[str, str]], where: str = "configuration", advice: str = "") -> None:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        lines = [f"{count} in the {where}:", *(f"  {path}: {text}" for path, text in problems), advice]
        super().__init__("\n".join(line for line in lines if line))
        self.problems, self.where, self.advice = problems, where, advice

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[list[tuple[str, str]], str, str]]:
        return ConfigError, (self.problems, self.where, self.advice)


class RunSection(Section):
    """Which run this is."""

    name: str = Field(min_length=1, pattern=r"^[^./\\\s][^/\\\s]*$")
    """The folder below `paths.runs`; the same name continues the same run."""
    fresh: bool
    """Start over: what the run's folder holds is deleted first."""
    repeat: str | None = Field(default=None, min_length=1)
    """The name or folder of a run whose stored settings this one starts from, to do the same again."""


class PathsSection(Section):
    """Where things are on this machine."""

    runs: str = Field(min_length=1)
    """Folder of all runs."""
    datasets: str = Field(min_length=1)
    """Folder that the files of data sets are relative to."""


class ModelSection(Section):
    """What joins the towers."""

    embed_dim: int = Field(gt=0)
    """Dimensions of the shared space."""
    logit_scale: float = Field(gt=0)
    """The multiplier of cosines at the start; 1 / 0.07 in CLIP."""
    max_logit_scale: float = Field(gt=0)
    """The multiplier is kept from growing beyond this."""
    learn_logit_scale: bool
    """Whether the multiplier is learnt, or stays as it is."""
    logit_bias: float | None
    """The bias of the logits at the start, learnt (-10 in SigLIP); null for none."""


class InitSection(Section):
    """What a new run starts from; one that is continued starts from its own checkpoint."""

    weights: str | None = Field(default=None, min_length=1)
    """A file or folder of weights, the name of a run, or open_clip:ARCHITECTURE/TAG; null for random weights."""


class EmaSection(Section):
    """A running mean of the weights, evaluated and saved beside them."""

    decay: float | None = Field(default=None, gt=0, lt=1)
    """How much of the mean stays at each step: 0.999 looks back over about 1,000 steps; null keeps no mean."""


class CheckpointSection(Section):
    """When the run is saved, and what is kept."""

    every: Cadence
    """How often, besides at the end and on a stop signal."""
    keep: int = Field(gt=0)
    """How many of the newest are kept, besides the best."""
    best: str | None
    """The metric that says which one is best, such as eval/shapes/top1, or eval_ema/shapes/top1; null keeps none."""
    mode: Literal["max", "min"]
    """Whether more or less of it is better."""
    background: bool = True
    """Write while training goes on, from a copy of weights and optimizer in memory; false waits, without a copy."""


class EarlyStopSection(Section):
    """Ending a run before its duration, when a metric no longer becomes better.

    Until then the run is the one that it would have been, so nothing of this is identity. A run that has stopped goes
    on with a larger patience.
    """

    metric: str | None = None
    """Such as eval/shapes/top1; null trains to the end."""
    mode: Literal["max", "min"] = "max"
    """Whether more or less of it is better."""
    patience: int = Field(default=5, gt=0)
    """Evaluations in a row without a better value, after which the run ends."""
    min_delta: float = Field(default=0.0, ge=0)
    """A value has to be better than the best by more than this."""

    @property
    def of(self) -> str | None:
        """What is waited for, without how long."""
        return None if self.metric is None else f"{self.metric} {self.mode} {self.min_delta}"


class LogSection(Section):
    """What is written down while training."""

    every: Cadence
    """How often the training metrics are logged; in steps, epochs or samples."""


class Config(Section):
    """The whole of what a program is told."""

    rules: ClassVar[tuple[Callable[[Any], "Findings"], ...]] = ()
    """What must hold between fields: each yields (dotted path, what is wrong)."""


C = TypeVar("C", bound=Config)

# --- rules across sections ------------------------------------------------------------------------------------------

Findings = Iterator[tuple[str, str]]


def _losses_find_their_towers(config: "TrainConfig") -> Findings:
    provided = {"logit_scale", "caption_ids", "label_ids", *(f"{tower}_features" for tower in config.towers)}
    if config.model.logit_bias is not None:
        provided.add("logit_bias")
    for name, loss in config.loss.items():
        if missing := sorted(loss.needs() - provided):
            bias = " (model.logit_bias=-10 is SigLIP's)" if "logit_bias" in missing else ""
            yield f"loss.{name}", f"needs {', '.join(missing)}{bias}; there are {', '.join(sorted(provided))}"


def _warmup_fits(config: "TrainConfig") -> Findings:
    warmup, duration = config.warmup, config.duration
    longest = 100 if warmup.unit == "%" else duration.amount
    if warmup.unit in ("%", duration.unit) and warmup.amount > longest:
        yield "warmup", f"{warmup} is longer than duration={duration}"


def _duration_is_not_zero(config: "TrainConfig") -> Findings:
    if config.duration.value == 0:
        yield "duration", f"{config.duration} trains nothing; dry_run=true shows what would be trained"


def _ranks_divide_the_batch(config: "TrainConfig") -> Findings:
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if config.global_batch_size % ranks:
        yield "global_batch_size", f"{config.global_batch_size} is not divisible by the {ranks} ranks"


def metrics_of(config: "TrainConfig") -> dict[str, Cadence]:
    """Of evaluations, by name, and how often they are found."""
    kinds: list[Weights] = ["raw"] if config.ema.decay is None else ["raw", "ema"]
    parts = config.evals.items()
    return {f"{EVAL[k]}/{name}/{metric}": part.every for k in kinds for name, part in parts for metric in part.metrics}


def _best_is_evaluated(config: "TrainConfig") -> Findings:
    yield from _is_evaluated("checkpoint.best", config.checkpoint.best, config)


def _early_stop_is_evaluated(config: "TrainConfig") -> Findings:
    metric = config.early_stop.metric
    yield from _is_evaluated("early_stop.metric", metric, config)
    if metric is not None and (every := metrics_of(config).get(metric)) is not None and every.unit == "never":
        yield "early_stop.metric", f"evals.{metric.split('/')[1]}.every=never: it is found only when the run is over"


def _is_evaluated(path: str, metric: str | None, config: "TrainConfig") -> Findings:
    known = list(metrics_of(config))
    if metric is not None and metric not in known:
        hint = did_you_mean(metric, known) or f" There are: {', '.join(known) or 'none'}."
        yield path, f"'{metric}' is not a metric of an evaluation.{hint}"


def _evaluations_find_their_towers(config: "TrainConfig") -> Findings:
    for name, part in config.evals.items():
        if missing := sorted(set(part.towers) - config.towers.keys()):
            yield f"evals.{name}", f"needs towers named {', '.join(missing)}; there are: {', '.join(config.towers)}"


def _kept_features_stay_the_same(config: "TrainConfig") -> Findings:
    for name, tower in config.towers.items():
        if tower.tuning.keep_features and tower.reads == "image" and config.augment.random:
            yield f"towers.{name}.tuning.keep_features", "images differ each time they are augmented: augment=none"


def _scale_below_its_limit(config: "TrainConfig") -> Findings:
    if config.model.logit_scale > config.model.max_logit_scale:
        limit = config.model.max_logit_scale
        yield "model.logit_scale", f"{config.model.logit_scale} is above max_logit_scale={limit}"


def _shards_suffice(config: "TrainConfig") -> Findings:
    if config.sharding == "full" and not config.optimizer.elementwise:
        yield "sharding", f"{type(config.optimizer).__name__} updates whole matrices: none, or another optimizer"
    if config.sharding == "full" and config.precision == "fp16":
        yield "sharding", "the scaling of gradients that fp16 needs is not supported in parts: none, or precision=bf16"


def _only_checkpoints_by_the_clock(config: "TrainConfig") -> Findings:
    cadences = {"log.every": config.log.every, **{f"evals.{k}.every": part.every for k, part in config.evals.items()}}
    for path, cadence in cadences.items():
        if cadence.unit == "minutes" or (path == "log.every" and cadence.unit == "never"):
            yield path, f"should be in steps, epochs or samples, got {cadence}"


def _rows_at_a_time(value: Any) -> Any:
    if value is None or value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise ValueError(f"should be a positive number, auto or null, got {value!r}")


# --- the whole ----------------------------------------------------------------------------------------------------


class TrainConfig(Config):
    """One experiment."""

    rules: ClassVar[tuple[Callable[[Any], Findings], ...]] = (
        _losses_find_their_towers,
        _warmup_fits,
        _duration_is_not_zero,
        _ranks_divide_the_batch,
        _best_is_evaluated,
        _early_stop_is_evaluated,
        _evaluations_find_their_towers,
        _kept_features_stay_the_same,
        _scale_below_its_limit,
        _shards_suffice,
        _only_checkpoints_by_the_clock,
    )

    run: Operational[RunSection]
    paths: Operational[PathsSection]
    seed: int = Field(ge=0)
    """Of initial weights, data order, augmentation and dropout."""
    duration: Operational[Duration]
    """How long to train; the only part of what is computed that may grow when a run is continued."""
    warmup: Warmup
    """How long the learning rate rises: a duration, or a share of the run's, such as 5%."""
    global_batch_size: int = Field(ge=2)
    """Pairs in a step, over all ranks."""
    micro_batch_size: Operational[Annotated[int | Literal["auto"] | None, BeforeValidator(_rows_at_a_time)]] = None
    """Pairs that the towers of a rank work on at a time: the gradient is that of the whole batch all the same (with
    other random masks, where towers draw some), with the memory of so many, for a second forward pass. auto finds the
    most that fit; null is all of a rank's."""
    sharding: Operational[Literal["none", "full"]] = "none"
    """Whether each rank holds all weights, or with full only a part of them, of their gradients, the optimizer's state
    and the running mean: the same numbers with less memory, for more traffic between ranks."""
    max_grad_norm: float | None = Field(gt=0)
    """Gradients are scaled down to this norm; null for no limit."""
    precision: Precision
    """bf16 and fp16 run the towers under autocast; auto takes bf16 where the hardware has it, else fp32. fp16 is for
    GPUs without bf16: its gradients are scaled. On a GPU, towers multiply float32 in TF32. Losses have their own."""
    device: Operational[Literal["auto", "cpu", "cuda"]]
    """auto takes a GPU if there is one."""
    compile: Operational[bool] = False
    """Compile the towers (torch.compile): a minute at the start, and again for other shapes."""
    deterministic: Operational[bool] = False
    """Take only algorithms that give the same bits every time; on a CPU, with as many threads, all do."""
    profile: Operational[bool] = False
    """Say where the time of a step goes, and keep a trace of some, in profile/ of the run's folder."""
    workers: Operational[int] = Field(ge=0)
    """Processes that read data, on each rank; 0 reads in the training process."""
    timeout: Operational[Timeout] = Timeout.parse("30minutes")
    """How long a rank waits for the others, or for a process that reads data, before the run ends."""
    max_broken: Operational[float] = Field(ge=0, le=1)
    """The run stops when more than this share of its samples was broken."""
    model: ModelSection
    towers: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], Tower] = Field(min_length=2)
    """By name; the name is also what losses and evaluations know them by."""
    init: InitSection = InitSection()
    """What the weights are before the first step."""
    loss: dict[str, Loss] = Field(min_length=1)
    """Terms, added up by their weights."""
    dataset: Dataset
    """What is trained on."""
    max_samples: int | None = Field(default=None, ge=2)
    """Train on the first so many samples of it only; null for all."""
    augment: Annotated[Augment, BeforeValidator(lambda value: Keep() if value is None else value)]
    """Random changes to training images; null for none."""
    optimizer: Optimizer
    schedule: Schedule
    ema: EmaSection = EmaSection()
    evals: Operational[Annotated[dict[str, Eval], BeforeValidator(lambda value: {} if value is None else value)]]
    """By name; null for none."""
    checkpoint: Operational[CheckpointSection]
    early_stop: Operational[EarlyStopSection] = EarlyStopSection()
    log: Operational[LogSection]
    tracker: Operational[Tracker]
    """Mirrors the log."""
    dry_run: Operational[bool]
    """Show the configuration, the size of the model and one batch, and train nothing."""

    @property
    def folder(self) -> Path:
        """The run's directory."""
        return Path(self.paths.runs) / self.run.name


class TrainedConfig(TrainConfig):
    """That of a run whose model is only used: however many ranks use it, none of them takes a part of its batch."""

    rules: ClassVar[tuple[Callable[[Any], Findings], ...]] = tuple(
        rule for rule in TrainConfig.rules if rule is not _ranks_divide_the_batch
    )


# --- checking -------------------------------------------------------------------------------------------------------


def check(raw: Mapping[str, Any], kind: type[C]) -> C:
    """The typed configuration; ConfigError with all of its problems, rules across sections included."""
    missing = list(_missing(raw))
    problems = [(".".join(path), "no value given") for path in missing]
    try:
        config = kind.model_validate(_without(raw, missing))
    except ValidationError as error:
        for line in error.errors(include_url=False):
            path = ".".join(str(key) for key in line["loc"]) or "."
            if all(path != known for known, _ in problems):
                problems.append((path, line["msg"]))
        problems += _broken_rules(_salvage(kind, raw), whole=False)
    else:
        problems += _broken_rules(config, whole=True)
    if problems:
        raise ConfigError(problems)
    return config


def _broken_rules(config: Config, whole: bool) -> list[tuple[str, str]]:
    broken: list[tuple[str, str]] = []
    for rule in config.rules:
        try:
            broken += list(rule(config))
        except AttributeError:
            if whole:
                raise
            continue  # the rule is about a value that is wrong itself
    return broken


def _salvage(section: type[Section], raw: object) -> Any:
    """A section with only those fields that are valid by themselves, so that rules about these can be checked."""
    valid = {}
    for name, field in section.model_fields.items():
        value = raw.get(name, MISSING) if isinstance(raw, Mapping) else MISSING
        annotation: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
        try:
            valid[name] = TypeAdapter(annotation).validate_python(value, strict=True)
        except ValidationError:
            inner = field.annotation
            if isinstance(inner, type) and issubclass(inner, Section) and not issubclass(inner, Part):
                valid[name] = _salvage(inner, value)
    salvaged = section.model_construct(_fields_set=set(valid), **valid)
    for name in set(section.model_fields) - set(valid):
        salvaged.__dict__.pop(name, None)  # a default would stand for a value that was given and is wrong
    return salvaged


def _missing(raw: object, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(raw, Mapping):
        for key, value in raw.items():
            yield from _missing(value, (*path, str(key)))
    elif raw == MISSING:
        yield path


def _without(raw: Mapping[str, Any], paths: list[tuple[str, ...]], at: tuple[str, ...] = ()) -> dict[str, Any]:
    kept = {}
    for key, value in raw.items():
        if (*at, key) not in paths:
            kept[key] = _without(value, paths, (*at, key)) if isinstance(value, Mapping) else value
    return kept


# --- comparing ------------------------------------------------------------------------------------------------------


def changed_identity(old: Mapping[str, Any], new: TrainConfig) -> list[tuple[str, str]]:
    """Where a stored configuration and a new one compute different things: (dotted path, "old -> new").

    Fields that did not exist when the old one was stored count with their defaults.
    """
    after = identity(new)
    before: object = {key: value for key, value in old.items() if key in after}
    try:
        before = identity(check(old, TrainConfig))
    except ConfigError:  # compared as it stands
        after = {key: value for key, value in new.model_dump(mode="json").items() if key in after}
    return differences(before, after)


def differences(before: object, after: object) -> list[tuple[str, str]]:
    """Where plain data differ: (dotted path, "before -> after")."""
    found: list[tuple[str, str]] = []

    def compare(path: str, was: object, is_now: object) -> None:
        if isinstance(was, Mapping) and isinstance(is_now, Mapping):
            for key in [*was, *(key for key in is_now if key not in was)]:
                compare(f"{path}.{key}" if path else str(key), was.get(key), is_now.get(key))
        elif was != is_now:
            found.append((path, f"{was} -> {is_now}"))

    compare("", before, after)
    return found


def computed(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What a stored configuration says of the numbers that come out: its identity, and how long it trains.

    One that is not valid (any more) is taken as it stands, but for the sections that are operational.
    """
    try:
        config = check(raw, TrainedConfig)
    except ConfigError:
        fields = TrainConfig.model_fields
        operational = {name for name, field in fields.items() if "operational" in field.metadata} - {"duration"}
        return {key: value for key, value in raw.items() if key not in operational}
    return {**identity(config), "duration": str(config.duration)}


def identity(value: Any) -> Any:
    """A section, or what is in one, as plain data without the fields that are operational, at any depth."""
    if isinstance(value, Section):
        fields = type(value).model_fields.items()
        known = {name: identity(getattr(value, name)) for name, field in fields if "operational" not in field.metadata}
        return {"_target_": value.target(), **known} if isinstance(value, Part) else known
    if isinstance(value, Mapping):
        return {key: identity(item) for key, item in value.items()}
    return TypeAdapter(type(value)).dump_python(value, mode="json")
