"""Folders of runs for tests of the report, as training and scripts/evaluate.py leave them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

RESULTS = {
    "eval/shapes/top1": {"value": 0.9091, "low": 0.8962, "high": 0.9213, "chance": 0.0125, "count": 2000},
    "eval/shapes/top5": {"value": 0.9871, "low": 0.9822, "high": 0.9917, "chance": 0.0625, "count": 2000},
    "eval/flickr8k/t2i_r1": {"value": 0.2345, "low": 0.2102, "high": 0.2591, "chance": 0.00123, "count": 813},
    "eval/flickr8k/t2i_median_rank": {"value": 7.0, "low": 6.0, "high": 8.5, "chance": 406.5, "count": 813},
    "eval/geometry/gap": {"value": 0.8123, "low": None, "high": None, "chance": None, "count": None},
}
"""results.json of scripts/evaluate.py: by metric key a value, the bounds of its 95% bootstrap interval, what guessing
gives, and the number of samples or queries that it is the mean of. All but the value may be null; so may the value,
where it was no number."""


def shifted(by: float) -> dict[str, dict[str, float | None]]:
    """The same results with other values."""
    moved = ("value", "low", "high")
    return {
        key: {name: told + by if name in moved and told is not None else told for name, told in found.items()}
        for key, found in RESULTS.items()
    }


def rows(num_rows: int = 6, seed: int = 1) -> list[dict[str, Any]]:
    """A training log with an evaluation at its end."""
    steps = [10 * (index + 1) for index in range(num_rows)]
    training = [
        {
            "step": step,
            "samples": 128 * step,
            "train/loss": 4.0 - 0.017 * step + 0.1 * seed,
            "train/broken_samples": 0,
            "train/samples_per_s": 400.0 + (7 * step + seed) % 50,
        }
        for step in steps
    ]
    end = {
        "step": steps[-1],
        "samples": 128 * steps[-1],
        "eval/old/top1": 0.3217 + 0.01 * seed,
        "eval/old/chance": 0.25,
    }
    return [*training, end]


def picture(path: Path, size: tuple[int, int] = (64, 48), noise: bool = False) -> None:
    """A PNG; one of noise is large."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (Image.effect_noise(size, 100).convert("RGB") if noise else Image.new("RGB", size, "navy")).save(path)


def evaluated(folder: Path, results: Mapping[str, Any] = RESULTS, step: int = 60) -> Path:
    """Leave what scripts/evaluate.py does; all that there is of a model that was not trained here."""
    place = folder / "evaluations" / f"step-{step:08d}"
    place.mkdir(parents=True, exist_ok=True)
    (place / "results.json").write_text(json.dumps(results))
    picture(place / "shapes_confusion_matrix.png")
    return folder


def trained(folder: Path, config: Mapping[str, Any] | None = None, log: list[dict[str, Any]] | None = None) -> Path:
    """Leave what training does."""
    folder.mkdir(parents=True, exist_ok=True)
    log = rows() if log is None else log
    whole = {
        "run": {"name": folder.name, "fresh": False},
        "seed": 1,
        "global_batch_size": 128,
        "optimizer": {"_target_": "multimodal.optim.AdamW", "lr": 0.001},
        "evals": {"shapes": {"_target_": "multimodal.evals.zero_shot.ZeroShot"}, "old": {}},
        **(config or {}),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(whole, sort_keys=False, allow_unicode=True))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    last: dict[str, Any] = {}
    for row in log:
        last |= row
    (folder / "summary.json").write_text(json.dumps({**last, "id": "0123abcd", "status": "finished"}))
    picture(folder / "figures" / "old_confusion_matrix.png")
    picture(folder / "figures" / "curves.png")
    return folder


def three(root: Path) -> list[Path]:
    """Two runs and a model that was only evaluated."""
    evaluated(trained(root / "a"))
    evaluated(trained(root / "b", {"seed": 2}, rows(seed=2)), shifted(-0.05))
    evaluated(root / "ViT-B-32-openai", shifted(-0.004), step=0)
    return [root / name for name in ("a", "b", "ViT-B-32-openai")]
