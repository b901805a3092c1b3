"""Pictures of a study, by Optuna."""

import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import optuna.visualization.matplotlib as optuna_plots
from optuna.trial import FrozenTrial, TrialState

from multimodal.search.study import Study

logger = logging.getLogger(__name__)

KINDS: dict[str, Callable[..., Any]] = {
    "history": optuna_plots.plot_optimization_history,
    "importance": optuna_plots.plot_param_importances,
    "parallel": optuna_plots.plot_parallel_coordinate,
    "slices": optuna_plots.plot_slice,
}


def write_plots(study: Study, folder: Path) -> Iterator[Path]:
    """Draw history, importance, parallel coordinates and slices of each objective, and the front of several."""
    matplotlib.use("Agg")
    folder.mkdir(exist_ok=True)
    if not any(trial.state == TrialState.COMPLETE for trial in study.trials):
        return
    metrics = list(study.search.objectives)
    for at, metric in enumerate(metrics):
        for kind, draw in KINDS.items():
            name = kind if len(metrics) == 1 else f"{kind}_{metric.replace('/', '_')}"
            settings = {"target": _value(at)} if len(metrics) > 1 else {}
            yield from _write(draw, study, folder / f"{name}.png", target_name=metric, **settings)
    if len(metrics) == 1:
        yield from _write(optuna_plots.plot_intermediate_values, study, folder / "curves.png")
    elif len(metrics) < 4:
        yield from _write(optuna_plots.plot_pareto_front, study, folder / "front.png", target_names=metrics)


def _value(at: int) -> Callable[[FrozenTrial], float]:
    return lambda trial: float(trial.values[at])


def _write(draw: Callable[..., Any], study: Study, path: Path, **settings: Any) -> Iterator[Path]:
    import matplotlib.pyplot as plt

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            drawn = draw(study.optuna, **settings)
            axes = drawn.flat[0] if hasattr(drawn, "flat") else drawn
            axes.figure.savefig(path, dpi=120, bbox_inches="tight")
    except (ValueError, RuntimeError) as error:  # such as an importance where all values are equal
        logger.warning("%s cannot be drawn: %s", path.name, error)
    else:
        yield path
    finally:
        plt.close("all")
