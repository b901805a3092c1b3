"""List every part with its knobs: `scripts/parts.py [WORD]` shows those whose name, kind or file contains the word."""

import argparse
import importlib
import inspect
import pkgutil
import re
from collections import defaultdict
from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from multimodal.cli import CONF
from multimodal.resolve import Part, Section, allowed_packages

SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "min_length": "length >="}


def modules() -> Iterator[str]:
    """Every module that parts may come from."""
    for package in sorted(allowed_packages()):
        root = importlib.import_module(package)
        yield from (found.name for found in pkgutil.walk_packages(root.__path__, f"{package}."))


def parts_by_kind() -> dict[str, list[type[Part]]]:
    """All parts under the name of the contract that they fill."""
    kinds = defaultdict(list)
    for name in modules():
        for value in vars(importlib.import_module(name)).values():
            is_part = inspect.isclass(value) and issubclass(value, Part) and not inspect.isabstract(value)
            if is_part and value.__module__ == name:
                kinds[value.contract().__name__].append(value)
    return dict(sorted(kinds.items()))


def readable(kind: Any) -> str:
    """A type in a few characters, as its values are written in YAML."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return readable(inner[0])
    if origin in (Union, UnionType):
        return " | ".join(map(readable, inner))
    if origin is Literal:
        return " | ".join(map(str, inner))
    if origin is tuple and inner[1:] == (...,):
        return f"list of {readable(inner[0])}"
    if origin in (tuple, list, dict):
        return f"{origin.__name__}[{', '.join(map(readable, inner))}]"
    if kind is type(None):
        return "null"
    return kind.__name__ if inspect.isclass(kind) else str(kind).replace("typing.", "")


def presets(part: type[Part]) -> list[str]:
    """Files below `conf/` that make one, as they are chosen: group=name."""
    target = f"{part.__module__}.{part.__qualname__}"
    named = re.compile(rf"^ *_target_: {re.escape(target)}$", re.MULTILINE)
    files = sorted(CONF.glob("*/*.yaml"))
    return [f"{file.parent.name}={file.stem}" for file in files if named.search(file.read_text())]


def bound(field: FieldInfo, word: str) -> object:
    """The value of a bound such as "gt" on a field, or None."""
    return next((getattr(item, word) for item in field.metadata if hasattr(item, word)), None)


def knobs(section: type[Section]) -> Iterator[str]:
    """One line for each field: name, type, bounds, default and meaning."""
    for name, field in section.model_fields.items():
        bounds = [f"{sign} {value}" for word, sign in SIGNS.items() if (value := bound(field, word)) is not None]
        default = [] if field.is_required() else [f"default {field.default!r}"]
        facts = ", ".join([readable(field.annotation), *bounds, *default])
        yield f"    {name} ({facts}): {field.description or ''}".replace("\n", "\n        ")


def main() -> None:
    """Print what there is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("word", nargs="?", default="", help="only parts whose name, kind or file contains it")
    word = parser.parse_args().word.lower()
    shown = [
        (kind, part)
        for kind, parts in parts_by_kind().items()
        for part in parts
        if word in " ".join([kind, part.__module__, part.__name__, *presets(part)]).lower()
    ]
    if not shown:
        parser.exit(1, f"no part has '{word}' in its name, kind or file; without a word all are listed\n")
    for kind, part in shown:
        chosen = ", ".join(presets(part)) or "no file in conf/ has it"
        text = f"{kind} {part.__module__}.{part.__qualname__}\n{chosen}\n{inspect.getdoc(part)}"
        print(text.replace("\n", "\n    "))
        print(*knobs(part), "", sep="\n")


if __name__ == "__main__":
    main()
