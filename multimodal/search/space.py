"""What is searched: for each swept key a range or values, some only where others have been chosen."""

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, PlainValidator, Strict

from multimodal.resolve import Section, did_you_mean

if TYPE_CHECKING:
    from optuna import Trial


def _number(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"should be a number, got {value!r}")
    return value


Number = Annotated[int | float, PlainValidator(_number)]
Assignment = dict[str, Any]
"""A value for each swept key that is in force."""


class Parameter(Section):
    """What is tried for one key of the configuration: a range from low to high, or values."""

    low: Number | None = None
    high: Number | None = None
    """Included; the range is of whole numbers where low, high and step are."""
    log: bool = False
    """Even in the logarithm, as learning rates want it."""
    step: Number | None = None
    """Only low, low + step, and so on."""
    values: Annotated[tuple[Any, ...], Strict(False)] | None = None
    """Choices: of values, or of files of a group."""
    when: dict[str, Any] = Field(default={})
    """Only where these other swept keys have this value, or one of these."""

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.values is not None:
            for name in ("low", "high", "log", "step"):
                if name in self.model_fields_set:
                    yield name, "is of a range, and there are values"
            if not self.values:
                yield "values", "there are none"
            for at, value in enumerate(self.values):
                if label(value) in map(label, self.values[:at]):
                    yield "values", f"{value!r} is there twice"
            return
        if self.low is None or self.high is None:
            yield ("high" if self.high is None else "low"), "no value given: a range has low and high; or give values"
            return
        if self.low >= self.high:
            yield "high", f"{self.high} is not above low={self.low}: the range is empty"
        if self.log and self.low <= 0:
            yield "low", f"should be above 0 where log=true, got {self.low}"
        if self.step is not None and self.log:
            yield "step", "a range with log=true has none"
        elif self.step is not None and not 0 < self.step <= self.high - self.low:
            yield "step", f"should be above 0 and at most high - low, got {self.step}"

    @property
    def whole(self) -> bool:
        """Whether it is a range of whole numbers."""
        return all(isinstance(number, int) for number in (self.low, self.high) if number is not None) and isinstance(
            self.step, int | None
        )

    def suggest(self, trial: "Trial", key: str) -> Any:
        """The value that the study's sampler chooses."""
        if self.values is not None:
            return self.meant(trial.suggest_categorical(key, [label(value) for value in self.values]))
        assert self.low is not None
        assert self.high is not None
        if self.whole:
            return trial.suggest_int(key, int(self.low), int(self.high), log=self.log, step=int(self.step or 1))
        return trial.suggest_float(key, self.low, self.high, log=self.log, step=self.step)

    def meant(self, stored: Any) -> Any:
        """The value that a study has stored a label of."""
        return stored if self.values is None else next(value for value in self.values if label(value) == stored)

    @property
    def size(self) -> int | None:
        """How many there are to try; None if they are not to be counted."""
        if self.values is not None:
            return len(self.values)
        assert self.low is not None
        assert self.high is not None
        if self.step is None and not (self.whole and not self.log):
            return None
        return math.floor(min((self.high - self.low) / (self.step or 1) + 1e-9, sys.maxsize)) + 1

    def grid(self) -> Iterator[Any]:
        """All there are to try, of those that can be counted."""
        if self.values is not None:
            return iter(self.values)
        low, step, size = self.low, self.step or 1, self.size
        assert low is not None
        assert size is not None
        return (low + at * step for at in range(size))

    def ends(self) -> Iterator[tuple[str, Any]]:
        """What to check before anything starts: (the field that says it, value)."""
        if self.values is not None:
            yield from (("values", value) for value in self.values)
        else:
            yield from (("low", self.low), ("high", self.high))

    def in_force(self, chosen: Mapping[str, Any]) -> bool:
        """Whether its conditions hold."""
        return all(
            key in chosen and label(chosen[key]) in map(label, alternatives(wanted))
            for key, wanted in self.when.items()
        )


Space = Mapping[str, Parameter]


def label(value: Any) -> Any:
    """What stands for a value in a study: itself, or its JSON where it is no scalar."""
    return value if isinstance(value, str | bool | int | float | None) else json.dumps(value)


def alternatives(wanted: Any) -> tuple[Any, ...]:
    """The values that a condition allows."""
    return tuple(wanted) if isinstance(wanted, list | tuple) else (wanted,)


def ordered(space: Space) -> list[str]:
    """The keys as they are given, but each behind those that it depends on; those of a circle are left out."""
    done: list[str] = []
    while ready := [key for key in space if key not in done and all(other in done for other in space[key].when)]:
        done += ready
    return done


def suggest(trial: "Trial", space: Space) -> Assignment:
    """Let the study's sampler choose, key by key."""
    chosen: Assignment = {}
    for key in ordered(space):
        if space[key].in_force(chosen):
            chosen[key] = space[key].suggest(trial, key)
    return chosen


def assignments(space: Space) -> Iterator[Assignment]:
    """Every combination there is, of a space without ranges that cannot be counted."""

    def behind(chosen: Assignment, keys: Sequence[str]) -> Iterator[Assignment]:
        if not keys:
            yield chosen
        elif space[keys[0]].in_force(chosen):
            for value in space[keys[0]].grid():
                yield from behind({**chosen, keys[0]: value}, keys[1:])
        else:
            yield from behind(chosen, keys[1:])

    return behind({}, ordered(space))


def num_assignments(space: Space, most: int) -> int:
    """How many there are, of which only those of conditions are made; some number above `most` if there are more."""
    deciding = {other for parameter in space.values() for other in parameter.when}
    free = [parameter for key, parameter in space.items() if key not in deciding]
    found = 0
    for chosen in assignments({key: parameter for key, parameter in space.items() if key in deciding}):
        found += math.prod(parameter.size or 0 for parameter in free if parameter.in_force(chosen))
        if found > most:
            break
    return found


def first_of(space: Space, fixed: Assignment) -> Assignment:
    """The first of everything, but what is fixed, and what that depends on."""
    fixed = dict(fixed)
    for key in reversed(ordered(space)):
        if key in fixed:
            for other, wanted in space[key].when.items():
                fixed.setdefault(other, alternatives(wanted)[0])
    chosen: Assignment = {}
    for key in ordered(space):
        if space[key].in_force(chosen):
            chosen[key] = fixed.get(key, next(space[key].ends())[1])
    return chosen


def conditions(space: Space) -> Iterator[tuple[str, str]]:
    """What is wrong with the conditions of a space: (dotted path, text)."""
    for key, parameter in space.items():
        for other, wanted in parameter.when.items():
            path = f"space.{key}.when.{other}"
            if other not in space:
                yield path, f"is no key of the space.{did_you_mean(other, space)}"
            elif (values := space[other].values) is None:
                yield path, "a condition is on values, and this is a range"
            elif not alternatives(wanted):
                yield path, "a condition on no value never holds"
            else:
                for value in alternatives(wanted):
                    if label(value) not in map(label, values):
                        told = f"{value!r} is none of its values."
                        yield path, told + did_you_mean(str(value), map(str, values))
    try:
        TopologicalSorter({key: set(parameter.when) for key, parameter in space.items()}).prepare()
    except CycleError as error:
        yield f"space.{error.args[1][0]}.when", f"depends on itself: {' <- '.join(error.args[1])}"
