"""What tests of searches share: small searches, and runs that only write their logs."""

import copy
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial

from multimodal.cli import compose
from multimodal.config import check
from multimodal.search.config import Objective, SweepConfig
from multimodal.search.locks import Locks
from multimodal.search.pruners import NoPruner, Pruner
from multimodal.search.samplers import Random, Sampler
from multimodal.search.space import Parameter, Space
from multimodal.search.storage import open_storage
from multimodal.search.study import Search, Study
from multimodal.search.trial import Followed

LR = Parameter(low=1e-4, high=1e-2, log=True)
SPACE: Space = {
    "optimizer.betas": Parameter(values=([0.9, 0.98], [0.9, 0.999]), when={"optimizer": "adamw"}),
    "optimizer": Parameter(values=("adamw", "lion")),
    "optimizer.lr": LR,
    "towers.text.layers": Parameter(low=1, high=3),
}
RANDOM, NO_PRUNER = Random(), NoPruner()


@cache
def _composed() -> dict[str, Any]:
    return compose("sweep", ["sweep=shapes_tiny", "name=search"])[0]


def raw_search(runs: Path) -> dict[str, Any]:
    """The configuration of a search, to be damaged at will."""
    return {**copy.deepcopy(_composed()), "paths": {**_composed()["paths"], "runs": str(runs)}}


def search(space: Space = SPACE, sampler: Sampler = RANDOM, pruner: Pruner = NO_PRUNER, trials: int = 8) -> Search:
    return Search(
        name="search",
        overrides=("experiment=shapes_tiny", "tracker=none"),
        space=space,
        objectives={"eval/shapes/top1": Objective(mode="max")},
        directions=["maximize"],
        sampler=sampler,
        pruner=pruner,
        seed=3,
        trials=trials,
    )


def study(what: Search, storage: InMemoryStorage | None = None) -> Study:
    return Study(storage or InMemoryStorage(), what)


def stored(raw: dict[str, Any], folder: Path, what: Search) -> Study:
    """The same on a disk."""
    return Study(open_storage(check({**raw, "paths": {**raw["paths"], "runs": str(folder)}}, SweepConfig)), what)


def quality(params: dict[str, Any]) -> float:
    return -abs(params["optimizer.lr"] - 1e-3) + params["towers.text.layers"]


def go_on(study: Study, trials: int) -> None:
    """Propose and end so many more."""
    for _ in range(trials):
        trial, _ = study.choose(study.create("me"))
        study.optuna.tell(trial, quality(trial.params))


class Written:
    """A run that has ended, with a log that is given to it bit by bit."""

    end = "finished"
    more = 0  # steps that it would have gone on for

    def __init__(self, folder: Path, values: Sequence[float | None], each: int) -> None:
        self.folder, self.values, self.each, self.shown, self.stopped = folder, values, each, 0, False

    def poll(self) -> int | None:
        self.shown = min(self.shown + self.each, len(self.values))
        rows = [
            {"step": at, "samples": 10 * at, "eval/shapes/top1": value}
            for at, value in enumerate(self.values[: self.shown], start=1)
        ]
        self.folder.mkdir(exist_ok=True)
        (self.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        over = self.stopped or self.shown == len(self.values)
        facts = {"total_steps": len(self.values) + self.more, "status": self.end if over else "running"}
        (self.folder / "summary.json").write_text(json.dumps(facts))
        return 0 if over else None

    def stop(self) -> None:
        self.stopped = True


def follow(found: Study, folder: Path, values: Sequence[float | None], each: int = 1, retries: int = 0) -> FrozenTrial:
    locks = Locks(folder)
    trial, _ = found.choose(found.create(locks.driver))
    followed = Followed(found, trial, [], folder / f"run-{trial.number}", locks, 0, retries)
    try:
        for _ in range(100):
            ended = followed.tick(lambda *_: Written(followed.folder, values, each))
            if ended is not None:
                return ended
        raise AssertionError
    finally:
        locks.close(done=True)


CURVES = [[0.1 + 0.01 * at + 0.3 * number for at in range(10)] for number in (2, 1, 3, 0, 1, 2)]
