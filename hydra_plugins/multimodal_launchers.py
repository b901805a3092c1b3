"""Launchers for `train.py -m`, where Hydra looks for them; what they do is in `multimodal/grids/`."""

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from multimodal.cli import plain
from multimodal.config import check
from multimodal.grids.cluster import Cluster
from multimodal.grids.grid import launch_grid
from multimodal.grids.here import Here


class _GridLauncher(Launcher):
    """Starts each run as a command of its own."""

    kind: type[Here] | type[Cluster]

    def __init__(self, **settings: Any) -> None:
        self.settings = plain(OmegaConf.create(settings))

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what Hydra gives."""
        self.loader, self.config = hydra_context.config_loader, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run a batch of a sweep."""
        run = check(self.settings, self.kind)
        return launch_grid(self.loader, self.config, job_overrides, initial_job_idx, run.processes, run)


class JoblibLauncher(_GridLauncher):
    """On this machine."""

    kind = Here


class SubmititLauncher(_GridLauncher):
    """On a cluster."""

    kind = Cluster
