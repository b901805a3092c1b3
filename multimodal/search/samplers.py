"""How the next trial is chosen. What is drawn at random depends on the seed, the trial's number and the key only."""

import json
from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from random import Random as Shuffle
from typing import TYPE_CHECKING, Any

from pydantic import Field

from multimodal.resolve import Part
from multimodal.search.space import Space, assignments, label, num_assignments

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

MOST = 1_000_000
"""Combinations of a grid."""


class Sampler(Part):
    """Chooses the parameters of a trial."""

    @abstractmethod
    def build(
        self,
        space: Space,
        seed: int,  # of the study
        number: int,  # of the trial
    ) -> "BaseSampler":
        """Optuna's sampler, for one trial."""

    def size(self, space: Space) -> int | None:
        """How many trials there are to make; None for any number. ValueError if the space does not suit."""
        return None


RELATIVE = ":relative_params:"
"""In the names of attributes by which Optuna shares what it has drawn for several keys together, as pieces of JSON."""


def _by_key(
    make: Callable[[int], "BaseSampler"],  # of a seed
    seed: int,  # of the study
    number: int,  # of the trial
) -> "BaseSampler":
    """A sampler that draws each key by itself, and keys together once.

    A trial that was left in the middle of its proposal then gets the other values that it would have had.
    """
    import numpy as np
    from optuna.samplers import BaseSampler

    def seeded(key: str) -> BaseSampler:
        return make(int(np.random.SeedSequence([seed, number, *key.encode()]).generate_state(1)[0]))

    class ByKey(BaseSampler):
        together = seeded("")

        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
            return self.together.infer_relative_search_space(study, trial)

        def sample_relative(self, study: Any, trial: Any, search_space: dict[str, Any]) -> dict[str, Any]:
            pieces = {int(key.split(":")[-1]): text for key, text in trial.system_attrs.items() if RELATIVE in key}
            with suppress(ValueError):  # pieces are lacking, or all: they are written one by one
                drawn = json.loads("".join(pieces[at] for at in sorted(pieces)))
                # Optuna would take the trial itself for another one that runs
                return {key: drawn[key] for key in search_space if key in drawn}
            return self.together.sample_relative(study, trial, search_space)

        def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
            return seeded(param_name).sample_independent(study, trial, param_name, param_distribution)

    return ByKey()


class TPE(Sampler):
    """Draws where good trials are dense and others are not (tree-structured Parzen estimator); the one to begin with.

    Bergstra et al. 2011, "Algorithms for Hyper-Parameter Optimization".
    """

    startup: int = Field(ge=0)
    """So many trials are drawn at random before."""

    def build(self, space: Space, seed: int, number: int) -> "BaseSampler":
        from optuna.samplers import TPESampler

        def make(drawn: int) -> "BaseSampler":
            return TPESampler(n_startup_trials=self.startup, seed=drawn, constant_liar=True)

        return _by_key(make, seed, number)


class GaussianProcess(Sampler):
    """Fits a smooth function to all trials; for few, expensive ones. A conditional key is drawn at random."""

    startup: int = Field(ge=0)
    """So many trials are drawn at random before."""

    def build(self, space: Space, seed: int, number: int) -> "BaseSampler":
        from optuna.samplers import GPSampler

        return _by_key(lambda drawn: GPSampler(n_startup_trials=self.startup, seed=drawn), seed, number)


class Random(Sampler):
    """Draws every trial at random, without looking at others."""

    def build(self, space: Space, seed: int, number: int) -> "BaseSampler":
        from optuna.samplers import RandomSampler

        return _by_key(RandomSampler, seed, number)


class Grid(Sampler):
    """Every combination once, in an order that the seed shuffles; ranges need a step, or whole numbers."""

    def size(self, space: Space) -> int:
        for key, parameter in space.items():
            if parameter.size is None:
                raise ValueError(f"a grid has no end of values for {key}: give it a step, or values")
        size = num_assignments(space, MOST)
        if size > MOST:
            raise ValueError(
                f"a grid of more than {MOST:,} combinations is too large to list: sampler=random draws them"
            )
        return size

    def build(self, space: Space, seed: int, number: int) -> "BaseSampler":
        from optuna.samplers import BaseSampler

        combinations = list(assignments(space))
        Shuffle(seed).shuffle(combinations)

        class Listed(BaseSampler):
            """Takes the combination that has the trial's number; Optuna's own grids are not conditional, or collide."""

            def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
                return {}

            def sample_relative(self, study: Any, trial: Any, search_space: Mapping[str, Any]) -> dict[str, Any]:
                return {}

            def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
                return label(combinations[number % len(combinations)][param_name])  # machines may make one too many

        return Listed()
