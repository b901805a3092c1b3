"""Pictures of a study, most of them by Optuna."""

import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import optuna
import optuna.visualization.matplotlib as optuna_plots
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.ticker import NullFormatter
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
    """Draw history, importance, parallel coordinates, slices of each objective; curves of one, the front of several."""
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
        yield from _write(_curves, study, folder / "curves.png", target_name=metrics[0])
    elif len(metrics) < 4:
        yield from _write(optuna_plots.plot_pareto_front, study, folder / "front.png", target_names=metrics)


def _value(at: int) -> Callable[[FrozenTrial], float]:
    return lambda trial: float(trial.values[at])


def _curves(study: optuna.Study, target_name: str) -> Any:
    """Of all trials, in the colour of what they came to; grey are those that ended early."""
    import matplotlib.pyplot as plt

    values = [trial.value for trial in study.trials if trial.state == TrialState.COMPLETE and trial.value is not None]
    scale, colors = Normalize(min(values), max(values)), plt.get_cmap("viridis")
    _, axes = plt.subplots(figsize=(7, 4.5), facecolor="white", subplot_kw={"facecolor": "white"})
    for trial in study.trials:
        value = trial.value if trial.state == TrialState.COMPLETE else None
        color = "0.75" if value is None else colors(scale(value))
        steps = sorted(trial.intermediate_values)
        axes.plot(steps, [trial.intermediate_values[step] for step in steps], ".-", color=color, linewidth=1)
    axes.set(xlabel="% of the run", ylabel=target_name, title="grey: ended early")
    axes.figure.colorbar(ScalarMappable(scale, colors), ax=axes, label=f"{target_name} in the end")
    return axes


def _write(draw: Callable[..., Any], study: Study, path: Path, **settings: Any) -> Iterator[Path]:
    import matplotlib.pyplot as plt

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            drawn = draw(study.optuna, **settings)
            axes = drawn.flat[0] if hasattr(drawn, "flat") else drawn
            for one in axes.figure.axes:
                if one.get_xscale() == "log":
                    one.xaxis.set_minor_formatter(NullFormatter())  # they would be printed over each other
            axes.figure.savefig(path, dpi=120, bbox_inches="tight")
    except (ValueError, RuntimeError) as error:  # such as an importance where all values are equal
        logger.warning("%s cannot be drawn: %s", path.name, error)
    else:
        yield path
    finally:
        plt.close("all")
