"""Evaluate a run: `scripts/evaluate.py run=NAME [checkpoint=best] [evals=[cifar10,flickr8k]]`."""

import json
import logging
from pathlib import Path
from typing import Literal

import hydra
from omegaconf import DictConfig
from pydantic import Field

from multimodal import checkpoint
from multimodal.cli import CONF, launch, plain
from multimodal.config import Config, ConfigError, PathsSection, check
from multimodal.parts import Eval

logger = logging.getLogger(__name__)


class EvaluateConfig(Config):
    """Which run, and on what."""

    run: str = Field(min_length=1)
    """Name of a run below `paths.runs`."""
    checkpoint: str | int
    """last, best, or a step."""
    evals: dict[str, Eval]
    """By name; those that the run was trained with, if there are none here."""
    paths: PathsSection
    device: Literal["auto", "cpu", "cuda"]
    workers: int = Field(ge=0)
    """Processes that read images."""


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="evaluate")
def main(composed: DictConfig) -> None:
    """Load the checkpoint, run the evaluations, write `evaluations/<step>/`, print the numbers."""
    asked = check(plain(composed), EvaluateConfig)
    run = Path(asked.paths.runs) / asked.run
    try:
        folder = checkpoint.find(run, str(asked.checkpoint))
    except FileNotFoundError as error:
        raise ConfigError([("run", str(error))]) from None

    from multimodal.assemble import Problems, draw, encoder, load, open_evaluations

    paths = asked.paths.model_dump()
    config, assembled = load(folder, paths=paths, device=asked.device, workers=asked.workers)
    problems = Problems()
    evaluations = open_evaluations(asked.evals or config.evals, asked.paths.datasets, problems)
    problems.report()
    found = run / "evaluations" / f"step-{checkpoint.load_state(folder).step:08d}"
    results: dict[str, float] = {}
    for name, evaluate in evaluations.items():
        report = evaluate(encoder(config, assembled))
        results |= {f"eval/{name}/{metric}": value for metric, value in report.metrics.items()}
        for _, path in draw(name, report, found):
            logger.info("%s", path)
    before = json.loads(numbers.read_text()) if (numbers := found / "results.json").exists() else {}
    checkpoint.write_json(numbers, {**before, **results})
    for key, value in results.items():
        logger.info("%s %.4f", key, value)


if __name__ == "__main__":
    launch(main)
