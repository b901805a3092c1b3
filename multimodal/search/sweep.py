"""A whole search: its trials, the best one under other seeds, and what is written of it all."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from optuna.exceptions import StorageInternalError

from multimodal.cli import compose
from multimodal.config import ConfigError, RunError
from multimodal.endings import StopSignal
from multimodal.search.config import MOST_REPLICATES, SweepConfig, size_of
from multimodal.search.driver import Driver
from multimodal.search.locks import Locks
from multimodal.search.overrides import override
from multimodal.search.plots import write_plots
from multimodal.search.process import Local
from multimodal.search.pruners import NoPruner
from multimodal.search.results import Saved, command, spread, table, write_experiment, write_results, write_table
from multimodal.search.samplers import Grid
from multimodal.search.space import Parameter
from multimodal.search.storage import open_storage
from multimodal.search.study import Search, Study

logger = logging.getLogger(__name__)

TABLE, RESULTS = "trials.csv", "results.json"


def sweep(
    config: SweepConfig,
    options: Sequence[str] = (),  # of the command line, for trials too
) -> None:
    """Run the search to its end, or to a stop signal; RunError if no trial came to its end."""
    _require_room(config)
    locks = Locks(config.folder)
    done = False
    try:
        with locks.alone():
            study = Study(open_storage(config), _search(config))
            study.require_same(config)
            _require_unused(config, study)
        paths = config.paths
        words = [override("paths.runs", paths.runs), override("paths.datasets", paths.datasets)]
        start = Local(config.workers, config.threads, options)
        signal = StopSignal()

        def run(study: Study) -> bool:
            return Driver(study, locks, start, words, Path(paths.runs), config.workers, config.retries).run(signal)

        with signal.heeded():
            at_once = f"{config.workers} at a time with {start.threads} threads each"
            logger.info("%d trials, %s; output in %s", config.trials, at_once, locks.folder)
            done = run(study)
            with locks.alone():
                write_table(study, config.folder / TABLE)
            seeds = None
            if done and config.replicates:
                seeds = _replicates(config, study)
                done = run(seeds)
        if not done:
            logger.info("stopped by a signal; the same command continues")
            return
        with locks.alone():
            _write(config, study, seeds, options)
    except StorageInternalError as error:
        told = str(error.__cause__ or error).splitlines()[0]
        raise RunError(f"the study's database failed ({told}); trials that run go on, the same command too") from error
    finally:
        locks.close(done)


def _search(config: SweepConfig) -> Search:
    return Search(
        name=config.name,
        overrides=config.overrides,
        space=config.space,
        objectives=config.objectives,
        directions=config.directions,
        sampler=config.sampler,
        pruner=config.pruner,
        seed=config.seed,
        trials=size_of(config),
    )


def _replicates(config: SweepConfig, study: Study) -> Study:
    """The best trial with other seeds, as a study beside the first, with all that this one can do."""
    best = study.best
    words = study.search.words(study.chosen(best))
    seed = compose("train", ["run.name=trial", *words])[0]["seed"]
    search = replace(
        study.search,
        name=f"{study.search.run_name(best.number)}-seeds",
        overrides=tuple(words),
        space={"seed": Parameter(values=tuple(range(seed + 1, seed + 1 + MOST_REPLICATES)))},  # later there may be more
        sampler=Grid(),
        pruner=NoPruner(),
        trials=config.replicates,
    )
    return Study(study.storage, search)


def _require_room(config: SweepConfig) -> None:
    """ConfigError if the study's folder is something else."""
    if (config.folder / "config.yaml").exists():
        raise ConfigError([("name", f"{config.folder} is a run: give the search another name")])


def _require_unused(config: SweepConfig, study: Study) -> None:
    """ConfigError if a run has the name of a trial that is still to be made."""
    known = len(study.trials)
    for folder in sorted(Path(config.paths.runs).glob(f"{config.name}-[0-9][0-9][0-9][0-9]")):
        if int(folder.name[-4:]) >= known:
            told = f"{folder} is there, and the study has no such trial: delete it, or give the search another name"
            raise ConfigError([("name", told)])


def _write(config: SweepConfig, study: Study, seeds: Study | None, options: Sequence[str]) -> None:
    """All that is to be seen of a search that has ended."""
    folder, best = config.folder, study.best
    plots = list(write_plots(study, folder / "plots"))
    if elsewhere := sum(not trial.state.is_finished() for trial in study.trials):
        logger.info("%d trials are not finished, in a folder of another machine", elsewhere)
    composed, groups = compose("train", ["run.name=trial", *study.search.words({})])
    path = folder / "experiment" / f"{study.search.name}_best.yaml"
    launch = command(path, config.paths.model_dump(), composed["paths"], options)
    write_experiment(study, groups, launch, path)
    write_results(study, seeds, launch, folder / RESULTS)
    logger.info("%s", table(study))
    saved = Saved.of(study)
    if study.can_prune or saved.early_stopping:
        logger.info("%s", saved)
    if seeds is not None:
        logger.info("trial %d with other seeds (%d): %s", best.number, config.replicates, spread(seeds))
    logger.info("all trials: %s; plots: %s", folder / TABLE, plots[0].parent if plots else "none")
    logger.info("the best, trial %d, is an experiment: %s", best.number, launch)
