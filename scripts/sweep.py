"""Search hyperparameters: `scripts/sweep.py sweep=NAME`; the same command again, or beside it, continues the search."""

import logging

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from multimodal.cli import launch, plain, program
from multimodal.search.checks import checked

logger = logging.getLogger(__name__)


@program("sweep")
def main(composed: DictConfig) -> None:
    """Check everything, run the trials, and write table, plots and the best configuration."""
    config = checked(plain(composed))

    from multimodal.search.sweep import sweep

    sweep(config, _search_path())


def _search_path() -> list[str]:
    """Folders of configurations that were given on the command line, which trials need too."""
    given = [s.path for s in HydraConfig.get().runtime.config_sources if s.provider == "command-line"]
    return [f"--config-dir={path}" for path in given]


if __name__ == "__main__":
    launch(main, verbatim=("storage",))
