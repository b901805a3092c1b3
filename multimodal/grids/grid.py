"""All runs of a grid, composed and checked before the first of them starts; what is done is passed over."""

import copy
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, open_dict, read_write

from multimodal.cli import OPTIONS, literal, plain
from multimodal.config import ConfigError, TrainConfig, check
from multimodal.grids.jobs import OPEN, Job, Outcome, failures
from multimodal.run_folder import FINISHED, is_finished

logger = logging.getLogger(__name__)

Run = Callable[[Sequence[Job], Path], list[Outcome]]
"""Runs jobs, with a folder for what they print."""


def launch_grid(
    loader: ConfigLoader,
    master: DictConfig,  # Hydra's, of the whole grid
    overrides: Sequence[Sequence[str]],  # of each run
    first: int,  # number of the first of them
    processes: int,  # of each run
    run: Run,
) -> list[JobReturn]:
    """Run what is not finished; ConfigError, before one starts, if one is wrong. Failures are in what is returned."""
    jobs = compose(loader, master, overrides, first, processes)
    ended = [Outcome(job, "finished") for job in jobs if job.done]
    waiting = [job for job in jobs if not job.done]
    told = f", {len(ended)} of them finished already: {', '.join(one.job.name for one in ended)}" if ended else ""
    logger.info("%d runs%s", len(jobs), told)
    if waiting:
        logs = Path(master.hydra.sweep.dir)
        logs.mkdir(parents=True, exist_ok=True)
        ended += run(waiting, logs)
    ended.sort(key=lambda one: jobs.index(one.job))
    failed = failures(ended)
    if any(one.status in OPEN for one in ended):
        logger.info("stopped by a signal; the same command goes on")
        if failed is None:
            sys.exit(0)
    return [_returned(one, list(words), failed) for one, words in zip(ended, overrides, strict=True)]


def compose(
    loader: ConfigLoader, master: DictConfig, overrides: Sequence[Sequence[str]], first: int, processes: int
) -> list[Job]:
    """The runs, checked; ConfigError with the problems of all of them."""
    problems: dict[tuple[str, str], list[str]] = {}
    jobs, names = [], []
    for number, words in enumerate(overrides, first):
        composed = loader.load_sweep_config(master, list(words))
        with open_dict(composed):
            composed.hydra.job.id = composed.hydra.job.num = number
        raw = _plain(composed)
        names.append(str(raw["run"]["name"]))
        try:
            with _ranks(processes):
                config = check(raw, TrainConfig)
        except ConfigError as error:
            for problem in error.problems:
                problems.setdefault(problem, []).append(names[-1])
            continue
        jobs.append(_job(config, words))
    HydraConfig.instance().set_config(master)
    for name, count in Counter(names).items():
        if count > 1:
            problems[("run.name", f"{count} runs of the grid would be '{name}'")] = names
    if problems:
        raise ConfigError([(path, text + _where(found, names)) for (path, text), found in problems.items()])
    return jobs


def _plain(composed: DictConfig) -> dict[str, Any]:
    """A run's configuration as its program gets it."""
    HydraConfig.instance().set_config(composed)
    task = copy.deepcopy(composed)
    with read_write(task), open_dict(task):
        del task["hydra"]
    return plain(task)


def _job(config: TrainConfig, overrides: Sequence[str]) -> Job:
    name = config.run.name
    words = [word for word in overrides if not word.startswith("run.name=")]
    command = (sys.argv[0], *_options(sys.argv[1:]), *words, f"run.name={literal(name)}")
    return Job(name, config.folder, command, config.checkpoint.best, is_finished(config), config.dry_run)


def _options(words: Sequence[str]) -> Iterator[str]:
    """Those that say where the configuration is."""
    for before, word in zip(["", *words], words, strict=False):
        if before in OPTIONS or word.partition("=")[0] in OPTIONS:
            yield word


@contextmanager
def _ranks(count: int) -> Iterator[None]:
    """What is checked is checked for so many processes."""
    before = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(count)
    try:
        yield
    finally:
        del os.environ["WORLD_SIZE"]
        if before is not None:
            os.environ["WORLD_SIZE"] = before


def _where(found: Sequence[str], names: Sequence[str]) -> str:
    """Which runs have a problem, unless all have it."""
    if len(found) == len(names):
        return ""
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return f" (in {', '.join(found[:3])}{more})"


def _returned(one: Outcome, overrides: Sequence[str], failed: Exception | None) -> JobReturn:
    """As Hydra's sweepers get it: the value, or what all that failed have to say."""
    if one.status in FINISHED or failed is None:
        return JobReturn(overrides=overrides, status=JobStatus.COMPLETED, _return_value=one.result)
    return JobReturn(overrides=overrides, status=JobStatus.FAILED, _return_value=failed)
