"""A study in its storage: its trials, who has them, and what became of them."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from multimodal.config import ConfigError, RunError, differences, identity
from multimodal.files import to_json
from multimodal.search.config import Objective, SweepConfig
from multimodal.search.overrides import merged, override
from multimodal.search.pruners import NoPruner, Pruner
from multimodal.search.samplers import Sampler
from multimodal.search.space import Assignment, Space, ordered, suggest

DRIVER, FAILURES, REFUSED, SAME_AS = "driver", "failures", "refused", "same_as"
"""Attributes of a trial: which process has it, why attempts failed, where it is to end early, which one it repeats."""
SAMPLES = "samples"
"""Attribute of a trial: how many its run took, and how many a whole run would have."""
ENDED = (TrialState.COMPLETE, TrialState.PRUNED)
DEFINITION = "definition"
"""Attribute of a study: what was searched, as it must stay."""


@dataclass(frozen=True)
class Search:
    """What a study searches."""

    name: str
    overrides: tuple[str, ...]
    space: Space
    objectives: Mapping[str, Objective]
    directions: list[Literal["minimize", "maximize"]]
    sampler: Sampler
    pruner: Pruner
    seed: int
    trials: int

    def run_name(self, number: int) -> str:
        """Of the run of a trial."""
        return f"{self.name}-{number:04d}"

    def run_of(self, trial: FrozenTrial) -> str:
        """The name of the run that a trial's values are of."""
        return self.run_name(trial.user_attrs.get(SAME_AS, trial.number))

    def words(self, chosen: Assignment) -> list[str]:
        """What `train.py` is told of a trial with these parameters."""
        return merged([*self.overrides, *(override(key, value) for key, value in chosen.items())])


class Study:
    """A study, as one process sees it."""

    def __init__(self, storage: BaseStorage, search: Search) -> None:
        self.search, self.storage = search, storage
        self.optuna = optuna.create_study(
            storage=storage, study_name=search.name, directions=search.directions, load_if_exists=True
        )
        self.optuna.pruner = search.pruner.build() or optuna.pruners.NopPruner()

    def require_same(self, config: SweepConfig) -> None:
        """Remember what is searched; ConfigError if the study of this name has searched something else."""
        mine = json.loads(to_json(identity(config)))
        theirs = self.optuna.user_attrs.get(DEFINITION)
        if theirs is None:
            self.optuna.set_user_attr(DEFINITION, mine)
        elif changed := differences(theirs, mine):
            where = f"way of continuing the study {self.search.name}: it has searched otherwise"
            raise ConfigError(changed, where, "The old values continue it; another name starts another study")

    @property
    def trials(self) -> list[FrozenTrial]:
        """All there are, of all processes."""
        return self.optuna.get_trials(deepcopy=False)

    @property
    def can_prune(self) -> bool:
        """Whether trials may end early."""
        return not isinstance(self.search.pruner, NoPruner)

    def create(self, driver: str) -> FrozenTrial:
        """A new trial, which says from its first moment on who has it."""
        template = optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs={DRIVER: driver})
        self.storage.create_new_trial(self.optuna._study_id, template_trial=template)
        return next(trial for trial in reversed(self.trials) if trial.user_attrs.get(DRIVER) == driver)

    def take(self, trial: FrozenTrial, driver: str) -> None:
        """Have a trial that another process had."""
        self.storage.set_trial_user_attr(trial._trial_id, DRIVER, driver)

    def choose(self, frozen: FrozenTrial) -> tuple[optuna.Trial, Assignment]:
        """The trial to work on, and its parameters; those that were chosen before stay."""
        search = self.search
        self.optuna.sampler = search.sampler.build(search.space, search.seed, frozen.number)
        trial = optuna.Trial(self.optuna, frozen._trial_id)
        return trial, suggest(trial, search.space)

    def chosen(self, trial: FrozenTrial) -> Assignment:
        """The parameters of a trial as values of the configuration."""
        space = self.search.space
        return {key: space[key].meant(trial.params[key]) for key in ordered(space) if key in trial.params}

    @property
    def best(self) -> FrozenTrial:
        """The best trial; of several objectives the one that is best in the first, and that no other beats in all."""
        if not any(trial.state == TrialState.COMPLETE for trial in self.trials):
            raise RunError(f"no trial of {self.search.name} has come to its end; the log of each is beside the study")
        first = -1 if self.search.directions[0] == "maximize" else 1
        return min(self.optuna.best_trials, key=lambda trial: (first * trial.values[0], trial.number))

    def twin(self, trial: optuna.Trial) -> FrozenTrial | None:
        """An earlier trial with the same parameters, which need not be run again."""
        mine = trial.params
        return next(
            (t for t in self.trials if t.state in ENDED and t.params == mine and SAME_AS not in t.user_attrs), None
        )

    def copy(self, trial: optuna.Trial, twin: FrozenTrial) -> None:
        """End a trial as another one did."""
        trial.set_user_attr(SAME_AS, twin.number)
        for step, value in twin.intermediate_values.items():
            trial.report(value, step)
        values = twin.values if twin.state == TrialState.COMPLETE else None
        self.optuna.tell(trial, values, state=twin.state)


def is_number(value: float | None) -> bool:
    """Whether an objective can be compared."""
    return value is not None and math.isfinite(value)
