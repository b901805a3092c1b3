"""Which trials end early. They are compared at the same share of their run, whatever the clock says."""

from abc import abstractmethod
from typing import TYPE_CHECKING

from pydantic import Field

from multimodal.resolve import Part

if TYPE_CHECKING:
    from optuna.pruners import BasePruner


class Pruner(Part):
    """Says at each evaluation whether a trial goes on; `step` of Optuna's is per cent of the run."""

    @abstractmethod
    def build(self) -> "BasePruner | None":
        """Optuna's pruner; None if no trial ends early."""


class NoPruner(Pruner):
    """Every trial runs to its end."""

    def build(self) -> None:
        return None


class Median(Pruner):
    """Ends a trial whose best value so far is worse than the median of the others at the same point."""

    startup: int = Field(ge=0)
    """So many trials run to their end before."""
    warmup: int = Field(ge=0, le=100)
    """Per cent of a run before which it is not ended."""

    def build(self) -> "BasePruner":
        from optuna.pruners import MedianPruner

        return MedianPruner(n_startup_trials=self.startup, n_warmup_steps=self.warmup)


class Hyperband(Pruner):
    """Lets a share of trials go on at each of several points of the run; for many trials.

    Li et al. 2018, "Hyperband: A Novel Bandit-Based Approach to Hyperparameter Optimization".
    """

    shortest: int = Field(ge=1, le=99)
    """Per cent of a run after which a trial may end."""
    reduction_factor: int = Field(ge=2)
    """One in so many goes on at each point."""

    def build(self) -> "BasePruner":
        from optuna.pruners import HyperbandPruner

        return HyperbandPruner(min_resource=self.shortest, max_resource=100, reduction_factor=self.reduction_factor)
