"""The model card of an export: README.md in the folder, with what hubs read above it."""

from pathlib import Path
from typing import Any

import yaml

from multimodal.export.exported import Exported


def write_card(
    exported: Exported,
    folder: Path,
    library: str,
    usage: str,  # Python
    differences: dict[str, float],
) -> None:
    """What the model is, how it is used, what it was trained on and with, and how it does."""
    config, record, model = exported.config, exported.record, exported.model
    head = {"library_name": library, "pipeline_tag": "zero-shot-image-classification", "tags": ["clip", "image-text"]}
    told = _without_places(config.model_dump(mode="json"))
    towers = told["towers"]
    described = {key: told[key] for key in ("dataset", "augment", "loss", "optimizer", "schedule", "warmup")}
    seen = record.step * config.global_batch_size
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {config.run.name}",
        f"An image and a text tower that project into one space of {model.embed_dim} dimensions.",
        f"```python\n{usage}\n```",
        "## Metrics",
        _table(("metric", "value"), [(name, f"{value:.4f}") for name, value in sorted(record.metrics.items())])
        or f"No evaluation was made at step {record.step}.",
        "## Model",
        _table(
            ("tower", "kind", "parameters"),
            [
                (name, type(tower).__name__, f"{model.num_parameters()[name]:,}")
                for name, tower in config.towers.items()
            ],
        ),
        f"Cosines are multiplied by {exported.logit_scale:.3f}"
        + ("." if exported.logit_bias is None else f"; {exported.logit_bias:.3f} is added."),
        f"```yaml\n{yaml.safe_dump(towers, sort_keys=False)}```",
        "## Training",
        f"{record.step:,} steps of {config.global_batch_size:,} pairs, {seen:,} in all, drawn from "
        f"{record.num_samples:,} samples; seed {config.seed}, {record.precision} precision.",
        f"```yaml\n{yaml.safe_dump(described, sort_keys=False)}```",
        _table(("trained with", "version"), list(record.versions.items())),
        "## Check of this export",
        "Largest differences from the model that was trained, over some images and texts:",
        _table(("of", "difference"), [(name, f"{value:.1e}") for name, value in differences.items()]),
    ]
    (folder / "README.md").write_text("\n\n".join(part for part in parts if part) + "\n")


def _without_places(value: Any) -> Any:
    """The same data, of absolute paths only the last part: where things are on this machine is nobody's business."""
    if isinstance(value, dict):
        return {key: _without_places(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_places(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Markdown; nothing where there are no rows."""
    if not rows:
        return ""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
