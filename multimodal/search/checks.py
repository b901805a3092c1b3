"""Every mistake in a search is told before its first trial, all at once.

Each end of each range and each choice is put into a configuration, beside the first of everything else, and that is
checked as `train.py` would.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from hydra.errors import HydraException

from multimodal.cli import compose
from multimodal.config import ConfigError, TrainConfig, check
from multimodal.resolve import did_you_mean
from multimodal.search.config import Objective, SweepConfig, salvaged
from multimodal.search.metrics import logged
from multimodal.search.overrides import is_group, merged, override, parsed, put
from multimodal.search.space import Assignment, Parameter, Space, conditions, first_of, ordered

Problem = tuple[str, str]
STANDS_FOR = "run.name=trial"
OWN = ("run.", "paths.", "dry_run", "hydra")
"""What keys begin with that a search sets itself."""


def checked(raw: Mapping[str, Any]) -> SweepConfig:
    """The typed search; ConfigError with all problems in it, and in the configurations of its trials."""
    problems: list[Problem] = []
    config = None
    try:
        config = check(raw, SweepConfig)
    except ConfigError as error:
        problems = error.problems
    given = raw.get("space")
    space = salvaged(given, Parameter)
    keys = list(given) if isinstance(given, Mapping) else []
    listed = raw.get("overrides")
    words = [word for word in listed if isinstance(word, str)] if isinstance(listed, list | tuple) else []
    bad_words, bad_conditions = list(_unfit(words, keys)), list(conditions(space))
    problems += [*bad_words, *bad_conditions]
    flagged = {path for path, _ in bad_words}
    words = [word for at, word in enumerate(words) if f"overrides.{at}" not in flagged]
    keys = [key for key in keys if f"space.{key}" not in flagged]
    space = {
        k: p for k, p in space.items() if not any(path.startswith(f"space.{k}.when") for path, _ in bad_conditions)
    }
    space = {key: space[key] for key in ordered(space) if key in keys}
    problems += _Trials(words, space, keys, list(salvaged(raw.get("objectives"), Objective))).problems()
    if problems or config is None:
        raise ConfigError(problems)
    return config


def _unfit(words: list[str], keys: list[str]) -> Iterator[Problem]:
    """What neither overrides nor a space may have."""
    own = "trials are named and placed by the search itself: name, paths"
    for at, word in enumerate(words):
        if word.startswith("~"):
            yield f"overrides.{at}", f"'{word}': an experiment file cannot take away"
        elif "=" not in word:
            yield f"overrides.{at}", f"should be key=value, got '{word}'"
        elif word.lstrip("+").startswith(OWN):
            yield f"overrides.{at}", f"'{word}': {own}"
    yield from ((f"space.{key}", own) for key in keys if key.startswith(OWN))


@dataclass
class _Probe:
    """One configuration that a trial may have."""

    path: str  # what in the search it is there to check
    key: str
    value: Any
    problems: list[Problem] = field(default_factory=list)
    config: TrainConfig | None = None

    def owns(self, path: str) -> bool:
        """Whether a problem at this path is with the key that it is there for."""
        return f"{path}.".startswith(f"{self.key.split('@')[-1]}.")


@dataclass
class _Trials:
    """What trials of a search would be."""

    overrides: list[str]
    space: Space
    keys: list[str]  # of the space, those of what is not valid too
    metrics: list[str]
    composed: dict[tuple[str, ...], dict[str, Any] | ConfigError] = field(default_factory=dict)

    def problems(self) -> Iterator[Problem]:
        """All of them, each once."""
        if isinstance(self.base, ConfigError):
            yield from (("overrides", _told(*problem)) for problem in self.base.problems)
            return
        unknown = dict(self._unknown_keys())
        yield from ((f"space.{key}", text) for key, text in unknown.items())
        known = {
            key: parameter
            for key, parameter in self.space.items()
            if key not in unknown and not any(other in unknown for other in parameter.when)
        }
        probes = list(self._probes(known)) or [_Probe("overrides", "", None)]
        for probe in probes:
            self._try(probe, first_of(known, {probe.key: probe.value}) if probe.key else {})
        yield from _attributed(probes)
        yield from self._never_logged(probes)

    @cached_property
    def base(self) -> dict[str, Any] | ConfigError:
        """Without anything of the space."""
        return self._composed(())

    @cached_property
    def groups(self) -> list[str]:
        """That a file can be chosen of."""
        return compose("train", [STANDS_FOR, *self._merged(())])[1]

    def _composed(self, words: tuple[str, ...]) -> dict[str, Any] | ConfigError:
        if words not in self.composed:
            try:
                self.composed[words] = compose("train", [STANDS_FOR, *self._merged(words)])[0]
            except ConfigError as error:
                self.composed[words] = error
        return self.composed[words]

    def _merged(self, words: tuple[str, ...]) -> list[str]:
        try:
            return merged([*self.overrides, *words])
        except HydraException:  # said when it is composed
            return [*self.overrides, *words]

    def _unknown_keys(self) -> Iterator[Problem]:
        for key in self.keys:
            if is_group(key, self.groups):
                continue
            chosen = first_of(self.space, {key: None}) if key in self.space else {}
            found = self._composed(self._choices({other: chosen[other] for other in chosen if other != key}))
            if isinstance(found, dict) and key not in (there := list(_paths(found))):
                yield key, f"is no key of the configuration.{did_you_mean(key, [*there, *self.groups])}"

    def _choices(self, chosen: Assignment) -> tuple[str, ...]:
        return tuple(override(key, value) for key, value in chosen.items() if is_group(key, self.groups))

    def _probes(self, space: Space) -> Iterator[_Probe]:
        for key, parameter in space.items():
            for name, value in parameter.ends():
                yield _Probe(f"space.{key}.{name}", key, value)

    def _try(self, probe: _Probe, chosen: Assignment) -> None:
        found = self._composed(self._choices(chosen))
        if isinstance(found, ConfigError):
            probe.problems = found.problems
            return
        found = copy.deepcopy(found)
        for key, value in chosen.items():
            if not is_group(key, self.groups):
                put(found, key, parsed(override(key, value))[2])
        try:
            probe.config = check(found, TrainConfig)
        except ConfigError as error:
            probe.problems = error.problems

    def _never_logged(self, probes: list[_Probe]) -> Iterator[Problem]:
        for probe in probes:
            there = [] if probe.config is None else logged(probe.config)
            for metric in self.metrics if there else ():
                if metric not in there:
                    where = f" where {probe.key} is {probe.value!r}" if _is_elsewhere(metric, probes) else ""
                    yield f"objectives.{metric}", f"is never logged{where}.{did_you_mean(metric, there)}"
                    self.metrics = [other for other in self.metrics if other != metric]


def _is_elsewhere(metric: str, probes: list[_Probe]) -> bool:
    return any(probe.config is not None and metric in logged(probe.config) for probe in probes)


def _attributed(probes: list[_Probe]) -> Iterator[Problem]:
    """Problems of configurations, at the value in the search that they come from."""
    seen = dict.fromkeys(problem for probe in probes for problem in probe.problems)
    for path, text in seen:
        having = [probe for probe in probes if (path, text) in probe.problems]
        owner = next((probe for probe in having if probe.key and probe.owns(path)), None)
        if owner is None and len(having) == len(probes):
            yield "overrides", _told(path, text)
        else:
            owner = owner or having[0]
            yield owner.path, f"{owner.value!r} is refused: {_told(path, text)}"


def _told(path: str, text: str) -> str:
    return text if path == "composition" else f"{path}: {text}"


def _paths(data: Mapping[str, Any], at: str = "") -> Iterator[str]:
    for key, value in data.items():
        yield f"{at}{key}"
        if isinstance(value, Mapping):
            yield from _paths(value, f"{at}{key}.")
