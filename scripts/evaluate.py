"""Evaluate runs, or open_clip's models: `scripts/evaluate.py run=NAME [checkpoint=best] [evals=[cifar10,flickr8k]]`."""

import logging
from typing import Annotated, Any

from omegaconf import DictConfig
from pydantic import BeforeValidator, Field, Strict

from multimodal import distributed
from multimodal.cli import launch, plain, program
from multimodal.config import check
from multimodal.finished_run import Settings
from multimodal.parts import Eval, Sources

logger = logging.getLogger(__name__)


def _several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


class EvaluateConfig(Settings):
    """Which models, and on what."""

    run: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...],
        Strict(False),
        Field(min_length=1),
        BeforeValidator(_several),
    ]
    """Names of runs below `paths.runs`, one or a list; patterns of names ("shapes_*"); open_clip:ARCHITECTURE, or
    open_clip:ARCHITECTURE/WEIGHTS with a tag or a file."""
    evals: dict[str, Eval]
    """By name; those that a run was trained with, if there are none here."""


@program("evaluate")
def main(composed: DictConfig) -> None:
    """Load each model, run the evaluations, write `evaluations/<step>/` in its folder, print the numbers.

    Data are opened, and all mistakes in them and in names told, before the first model is loaded.
    """
    asked = check(plain(composed), EvaluateConfig)

    from multimodal.assemble import Problems, device_of, evaluate
    from multimodal.results import FILE, estimates, write_figures, write_numbers
    from multimodal.results_table import table
    from multimodal.subjects import find, open_all

    problems = Problems()
    subjects = find(asked.run, asked, problems)
    evaluations = open_all(subjects, asked.evals, Sources(asked.paths.datasets), problems)
    problems.report()
    distributed.start(device_of(asked.device))
    found = {}
    try:
        for subject in subjects:
            with problems.at(f"run {subject.name}"):
                encoder = subject.load()
            problems.report()
            reports = evaluate(evaluations[subject.name], encoder, asked.weights)
            found[subject.name] = estimates(reports)
            if distributed.rank() == 0:
                write_numbers(reports, subject.folder)
                for _, path in write_figures(reports, subject.folder):
                    logger.info("%s", path)
                logger.info("%s", subject.folder / FILE)
            del encoder, reports  # before the next model takes its place
    finally:
        distributed.stop()
    if distributed.rank() == 0:
        logger.info("%s", table(found))


if __name__ == "__main__":
    launch(main)
