"""Evaluate a run: `scripts/evaluate.py run=NAME [checkpoint=best] [evals=[cifar10,flickr8k]]`."""

import logging

from omegaconf import DictConfig

from multimodal import checkpoint, distributed
from multimodal.cli import launch, plain, program
from multimodal.config import ConfigError, check
from multimodal.finished_run import FinishedRun
from multimodal.parts import Eval

logger = logging.getLogger(__name__)


class EvaluateConfig(FinishedRun):
    """Which run, and on what."""

    evals: dict[str, Eval]
    """By name; those that the run was trained with, if there are none here."""


@program("evaluate")
def main(composed: DictConfig) -> None:
    """Load the checkpoint, run the evaluations, write `evaluations/<step>/`, print the numbers."""
    asked = check(plain(composed), EvaluateConfig)
    folder = asked.find_checkpoint()

    from multimodal.assemble import Problems, device_of, evaluate, load, open_evaluations
    from multimodal.results import estimates, folder_of, write_figures, write_numbers

    paths = asked.paths.model_dump()
    config, assembled = load(folder, asked.weights, paths=paths, device=asked.device, workers=asked.workers)
    evals = asked.evals or config.evals
    if not evals:
        raise ConfigError([("evals", "the run was trained with none: name some, such as evals=[shapes]")])
    problems = Problems()
    evaluations = open_evaluations(evals, asked.paths.datasets, problems)
    problems.report()
    distributed.start(device_of(config.device))
    try:
        reports = evaluate(evaluations, assembled.encoder(config.workers), asked.weights)
    finally:
        distributed.stop()
    if distributed.rank() != 0:
        return
    found = folder_of(asked.folder, checkpoint.load_state(folder).step)
    write_numbers(reports, found)
    for _, path in write_figures(reports, found):
        logger.info("%s", path)
    for key, estimate in estimates(reports).items():
        logger.info("%s %.4f", key, estimate.value)


if __name__ == "__main__":
    launch(main, verbatim=("run",))
