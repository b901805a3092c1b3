"""Small files, of a run or of data: JSON and YAML that may come from strangers, and JSON as we write it."""

import json
import math
from pathlib import Path
from typing import Any

import yaml


def from_json(text: str | bytes, name: str) -> Any:
    """What a JSON text holds; ValueError, with the `name` of the text, if it is none, or nested without end."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name}: not JSON ({error})") from None
    except RecursionError:
        raise ValueError(f"{name}: not JSON to be read (nested too deeply)") from None


def from_yaml(text: str, name: str) -> Any:
    """What a YAML text holds; ValueError, with the `name` of the text, if it is not plain.

    Plain is without tags that name classes, and without aliases, which can make a small file fill the memory.
    """
    try:
        return yaml.load(text, _PlainLoader)  # which is a SafeLoader
    except RecursionError:
        raise ValueError(f"{name} is not plain YAML: nested too deeply") from None
    except (yaml.YAMLError, ValueError, AttributeError) as error:  # of tags whose values do not fit: !!int x
        raise ValueError(f"{name} is not plain YAML: {error}") from None


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias")
        return super().compose_node(parent, index)


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
