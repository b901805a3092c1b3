"""Train an experiment: `train.py experiment=NAME key=value ...`; the same command again continues a run."""

import sys

from omegaconf import DictConfig

from multimodal.cli import launch, plain, program
from multimodal.config import TrainConfig, check
from multimodal.repeats import repeated


@program("train")
def main(composed: DictConfig) -> float | None:
    """Compose, validate, train; the best value of the metric that checkpoints are judged by, for sweeps."""
    config = check(plain(composed), TrainConfig)

    from multimodal.dry_run import dry_run
    from multimodal.trainer import Trainer

    if config.dry_run:
        dry_run(config)
        return None
    summary = Trainer(config).run()
    if summary.get("status") == "stopped":
        sys.exit(0)  # by a signal: the other runs of a sweep do not start
    return summary.get(f"best/{config.checkpoint.best}")


if __name__ == "__main__":
    launch(main, rewritten=repeated)
