"""How the next trial is chosen. What is drawn at random depends on the seed and the trial's number only."""

from abc import abstractmethod
from collections.abc import Mapping
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


def _seed(seed: int, number: int) -> int:
    """Of one trial, so that a study that was interrupted goes on as it would have."""
    import numpy as np

    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


class TPE(Sampler):
    """Draws where good trials are dense and others are not (tree-structured Parzen estimator); the one to begin with.

    Bergstra et al. 2011, "Algorithms for Hyper-Parameter Optimization".
    """

    startup: int = Field(ge=0)
    """So many trials are drawn at random before."""

    def build(self, space: Space, seed: int, number: int) -> "BaseSampler":
        from optuna.samplers import TPESampler

        return TPESampler(n_startup_trials=self.startup, seed=_seed(seed, number), constant_liar=True)


class GaussianProcess(Sampler):
    """Fits a smooth function to all trials; for few, expensive ones. A conditional key is drawn at random."""

    startup: int = Field(ge=0)
    """So many trials are drawn at random before."""

    def build(self, space: Space, seed: int, number: int) -> "BaseSampler":
        from optuna.samplers import GPSampler

        return GPSampler(n_startup_trials=self.startup, seed=_seed(seed, number))


class Random(Sampler):
    """Draws every trial at random, without looking at others."""

    def build(self, space: Space, seed: int, number: int) -> "BaseSampler":
        from optuna.samplers import RandomSampler

        return RandomSampler(seed=_seed(seed, number))


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
