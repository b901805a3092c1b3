"""Small files of a run."""

import json
import math
from pathlib import Path
from typing import Any


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON as the standard has it: numbers that are not finite become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one piece."""
    partial = path.with_name(f".partial-{path.name}")
    partial.write_text(to_json(value, indent=2) + "\n")
    partial.replace(path)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
