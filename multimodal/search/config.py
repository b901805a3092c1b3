"""What a search is told."""

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, Strict

from multimodal.config import Config, Findings, PathsSection
from multimodal.resolve import Operational, Section
from multimodal.search.pruners import NoPruner, Pruner
from multimodal.search.samplers import Sampler
from multimodal.search.space import Parameter

MOST_REPLICATES = 100


class Objective(Section):
    """What is made of a metric that a run has logged."""

    mode: Literal["max", "min"]
    """Whether more or less of it is better."""
    value: Literal["last", "best", "median"] = "last"
    """Of the values in a run: that of its end; the best one, which flatters noise; the median, as for samples/s."""

    def of(self, values: list[float]) -> float:
        """The one that counts, of those that were logged."""
        if self.value == "last":
            return values[-1]
        if self.value == "median":
            return median(values)
        return max(values) if self.mode == "max" else min(values)


def _short(value: Any) -> Any:
    return {"mode": value} if isinstance(value, str) else value


def _grid_has_an_end(config: "SweepConfig") -> Findings:
    try:
        config.sampler.size(config.space)
    except ValueError as error:
        yield "sampler", str(error)


def _one_value_is_pruned_by(config: "SweepConfig") -> Findings:
    if len(config.objectives) > 1 and not isinstance(config.pruner, NoPruner):
        yield "pruner", "trials with several objectives cannot be ended early: pruner=none"


def _replicates_differ_in_their_seed(config: "SweepConfig") -> Findings:
    if config.replicates and "seed" in config.space:
        yield "replicates", "repeats the best trial with other seeds, and seed is swept"


class SweepConfig(Config):
    """A search: what is tried, how, and how much of it."""

    rules: ClassVar = (
        _grid_has_an_end,
        _one_value_is_pruned_by,
        _replicates_differ_in_their_seed,
    )

    name: Operational[Annotated[str, Field(min_length=1, max_length=80, pattern=r"^[^./\\\s][^/\\\s]*$")]]
    """Of the study and its folder below `paths.runs`; the same name continues the same study."""
    overrides: Annotated[tuple[str, ...], Strict(False)]
    """What all trials are told, as on the command line of `train.py`: experiment=NAME, key=value."""
    space: dict[str, Parameter] = Field(min_length=1)
    """By key of the configuration, or by group."""
    objectives: dict[str, Annotated[Objective, BeforeValidator(_short)]] = Field(min_length=1)
    """By metric, as it is logged; max or min, or the mode and what value counts."""
    sampler: Sampler
    """How trials are chosen."""
    pruner: Pruner
    """Which trials end early, judged by the only objective."""
    seed: int = Field(ge=0)
    """Of the choices."""
    trials: Operational[int] = Field(gt=0)
    """How many, over all processes that work on the study."""
    workers: Operational[int] = Field(gt=0)
    """How many at a time, in this process."""
    threads: Operational[int | None] = Field(gt=0)
    """Of each trial; null divides the cores among the workers."""
    retries: Operational[int] = Field(ge=0)
    """How often a trial that died, or whose objective is no number, is started again."""
    replicates: Operational[int] = Field(ge=0, le=MOST_REPLICATES)
    """How often the best trial is repeated in the end, with other seeds."""
    storage: Operational[str | None] = Field(min_length=1)
    """A database, as SQLAlchemy writes them: postgresql+psycopg://user@host/name; null for a file in the folder."""
    paths: Operational[PathsSection]

    @property
    def folder(self) -> Path:
        """The study's directory."""
        return Path(self.paths.runs) / self.name

    @property
    def directions(self) -> list[Literal["minimize", "maximize"]]:
        """Of the objectives, as Optuna calls them."""
        return ["maximize" if one.mode == "max" else "minimize" for one in self.objectives.values()]


def size_of(config: SweepConfig) -> int:
    """How many trials there will be."""
    size = config.sampler.size(config.space)
    return config.trials if size is None else min(config.trials, size)


def salvaged(raw: Any, kind: type[Section]) -> dict[str, Any]:
    """Those of a mapping that are valid by themselves."""
    found: dict[str, Any] = {}
    for key, value in raw.items() if isinstance(raw, Mapping) else ():
        try:
            found[str(key)] = kind.model_validate(_short(value) if kind is Objective else value)
        except ValueError:
            continue
    return found
